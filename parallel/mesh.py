"""Mesh: a Layout turned into process groups, and where this process stands in them."""

from __future__ import annotations

import os
import platform
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel import mcore
from parallel.exact import compute_exactly
from parallel.layout import Layout
from parallel.place import section

PATIENCE_S = 1800.0
"""What torch waits for other ranks in a collective, where the caller does not say."""


class Mesh:
    """The ranks of one layout: this process's coordinates, its device and its process groups.

    Use as a context: the groups exist inside it and are torn down at the end, so that one process can walk through
    stages of different layouts. torch.distributed itself is started on first use and outlives the mesh.
    """

    def __init__(self, layout: Layout, *, patience_s: float = PATIENCE_S):
        start_distributed(patience_s=patience_s)
        world_size = dist.get_world_size()
        self.layout = layout
        self.dp = layout.dp(world_size)
        mcore.parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.sp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=patience_s / 60,
        )
        self.groups = mcore.ProcessGroupCollection.use_mpu_process_groups()
        self.world_size, self.rank = world_size, dist.get_rank()
        self.device = device()

    @classmethod
    def build(cls, layout: Layout, *, patience_s: float = PATIENCE_S) -> Mesh:
        """Create the process groups of a layout over all ranks. Collective: every rank calls it with the same layout.

        patience_s: a collective that has waited so long for another rank fails. Raises ValueError when the layout does
        not fit the world.
        """
        with section("process groups"):
            return cls(layout, patience_s=patience_s)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind, *exc) -> None:
        """Behind an error of one of several GPU ranks nothing is destroyed: NCCL would wait for the others."""
        self.close(destroy=kind is None or self.device.type == "cpu" or self.world_size == 1)

    def close(self, *, destroy: bool = True) -> None:
        """Forget the process groups, so that another mesh can be built, and destroy them; torch.distributed stays up.

        megatron only forgets its groups: their threads (gloo) and communicators (NCCL) would stay until the end.
        """
        groups = [group for group in mcore.parallel_state._global_process_group_list if group is not None]
        mcore.parallel_state.destroy_model_parallel()
        self.groups = None
        for group in groups if destroy else ():
            dist.destroy_process_group(group)

    @property
    def tp_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self.groups.tp.rank()

    @property
    def pp_rank(self) -> int:
        """Pipeline stage of this process, 0 first."""
        return self.groups.pp.rank()

    @property
    def sp_rank(self) -> int:
        """Which shard of every row this process holds."""
        return self.groups.cp.rank()

    @property
    def dp_rank(self) -> int:
        """Which rows this process reads."""
        return self.groups.dp.rank()

    @property
    def ep_rank(self) -> int:
        """Which of the routed experts this process holds."""
        return self.groups.ep.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the head and computes the loss."""
        return self.pp_rank == self.layout.pp - 1


def check_one_row(layout: Layout) -> None:
    """Raise ValueError unless the processes of this world are the layout's sp ranks, all at work on one row."""
    start_distributed()
    world_size = dist.get_world_size()
    if layout.sp != world_size:
        raise ValueError(
            f"sp={layout.sp} does not fit {world_size} process{'es' * (world_size > 1)}; write sp={world_size}, "
            "or start sp processes with torchrun --nproc_per_node"
        )


def device() -> torch.device:
    """The device of this process: its GPU by LOCAL_RANK, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def start_distributed(*, patience_s: float = PATIENCE_S, watched: bool = False, deterministic: bool = False) -> None:
    """Start torch.distributed from torchrun's variables, or a world of one process without them. Idempotent.

    patience_s: a collective of all ranks that has waited so long for another rank fails. watched: a RankWatch will be
    entered, which ends a rank whose collective failed; without one torch itself has to. deterministic: see
    parallel.exact. Raises ValueError where two processes would share a GPU.
    """
    if deterministic:
        compute_exactly()
    if dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(device())
        if watched:  # a failed collective raises in the main thread, not an abort from a thread of NCCL's
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=patience_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if on_gpu:
        mine = (platform.node(), str(torch.cuda.get_device_properties(device()).uuid))
        everyone = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        check_one_rank_a_gpu(everyone)


def end_distributed() -> None:
    """Leave torch.distributed at a good end, which all ranks come to; NCCL warns where a process ends without.

    Not behind an error, where NCCL might wait for a rank that is gone.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def check_one_rank_a_gpu(gpus: list[tuple[str, str]]) -> None:
    """Raise ValueError if two ranks hold one GPU, which NCCL cannot serve. gpus: (host, GPU) by rank."""
    for rank, gpu in enumerate(gpus):
        first = gpus.index(gpu)
        if first != rank:
            raise ValueError(
                f"ranks {first} and {rank} share one GPU of {gpu[0]}; start one process a GPU (torchrun "
                "--nproc_per_node), or hide the GPUs to run on CPU: CUDA_VISIBLE_DEVICES="
            )
