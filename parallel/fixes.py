"""What megatron-core 0.16.1 gets wrong in saving the distributed optimizer, and in sending, put right.

`parallel.mcore` puts these methods in the place of megatron's own.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from queue import SimpleQueue

import torch
import torch.distributed as dist

from parallel.collectives import together

_STATE = ("param", "exp_avg", "exp_avg_sq")


def get_parameter_state_dp_zero(self, use_gloo_comm=True, empty_data=False, return_on_all_ranks=False) -> dict:
    """Master weights and moments of every parameter buffer, gathered over the data-parallel ranks, on the CPU.

    The tensors have the buffer's own coordinates, padding between buckets included, because
    sharded_param_state_fully_reshardable cuts parameters out of them by those. megatron's own leaves the padding out:
    every parameter behind a padded bucket is then saved with its neighbor's state, without a message.
    """
    state: dict = {"buckets_coalesced": True}
    for index, ranges in enumerate(self.gbuf_ranges):
        ((dtype, per_bucket),) = ranges.items()
        buffer = self.buffers[index]
        whole = {key: torch.zeros(buffer.numel, dtype=torch.float32, device="cpu") for key in _STATE}
        if not empty_data:
            for bucket, range_map in zip(buffer.buckets, per_bucket, strict=True):
                _gather_bucket(self, bucket, range_map["param_map"], whole)
        state[index] = {dtype: {**whole, "numel_unpadded": buffer.numel_unpadded}}
    return state


def _gather_bucket(optimizer, bucket, param_map: dict, whole: dict) -> None:
    """Fill the bucket's part of the whole buffers from the shard that each data-parallel rank holds."""
    group, numel = optimizer.data_parallel_group, bucket.grad_data.numel()
    device = torch.cuda.current_device()
    shards = {key: torch.zeros(numel // group.size(), dtype=torch.float32, device=device) for key in _STATE}
    for model_param, param_range in param_map.items():
        place = slice(param_range["gbuf_local"].start, param_range["gbuf_local"].end)
        tensors = optimizer._get_main_param_and_optimizer_states(model_param)
        for key, shard in shards.items():
            shard[place] = tensors[key].detach()
    for key, shard in shards.items():
        parts = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(parts, shard, group=group)
        whole[key][bucket.offset : bucket.offset + numel] = torch.cat(parts).cpu()


def keeping_what_is_sent(communicate: Callable) -> Callable:
    """P2PCommunicator._communicate, sending through tensors of its own.

    The interleaved schedule takes the memory from a stage's output (`output.data = ...`) before the send of it was
    waited for. A send that is under way holds the tensor, not its memory, and gloo goes on reading what has been freed;
    so may NCCL, depending on how torch protects the memory of asynchronous calls. An alias keeps the memory.
    """

    @wraps(communicate)
    def wrapper(self, *, tensor_send_next, tensor_send_prev, **options):
        next_, previous = (None if x is None else x.detach() for x in (tensor_send_next, tensor_send_prev))
        return communicate(self, tensor_send_next=next_, tensor_send_prev=previous, **options)

    return wrapper


def save_common(strategy, common: dict, checkpoint_dir) -> None:
    """Write common.pt on rank 0; all ranks raise ValueError where the disk does not take it.

    megatron's own leaves the others waiting for rank 0.
    """

    def write() -> None:
        if dist.get_rank() == 0:
            content = io.BytesIO()
            torch.save(common, content)
            try:
                (Path(checkpoint_dir) / "common.pt").write_bytes(content.getvalue())
            except OSError as error:
                raise ValueError(f"common.pt: {error.strerror or error}") from None

    together(write)


def results_queue() -> SimpleQueue:
    """What a save in this process hands its results through.

    megatron's own is a queue in a process of its own, started at the first save and never ended. It serves its saves in
    the background, which a benchmark alone uses, and a signal that tells the whole job to save kills it: then it fails.
    """
    return SimpleQueue()
