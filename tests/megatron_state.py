"""What megatron makes of an engine's state to save it: the reference for what our checkpoints hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from parallel import mcore
from parallel.engine import Engine, sharded_weights
from parallel.optimizer import allocate_state, parts_of, step_count

_STATE = ("param", "exp_avg", "exp_avg_sq")


def sharded_state(engine: Engine) -> dict:
    """Model and optimizer as megatron's sharded state dict. Collective.

    megatron's own numbers its optimizers (one for experts, one for the rest) and their groups, which differ between
    layouts; here all that counts is the names of the tensors.
    """
    weights = sharded_weights(engine.models, engine.mesh)
    allocate_state(engine.optimizer)
    about = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": engine.mesh.groups.dp_cp}
    about["non_homogeneous_layers"] = True
    parts = [part.sharded_param_state_fully_reshardable(weights, False, about) for part in parts_of(engine.optimizer)]
    return {"model": weights, "optimizer": {"step": step_count(engine.optimizer), "parts": dict(enumerate(parts))}}


def save_as_megatron(engine: Engine, folder: str) -> None:
    """megatron's own save to a folder that is there. Collective."""
    mcore.dist_checkpointing.save(sharded_state(engine), folder, validate_access_integrity=False)


def get_parameter_state_dp_zero(self, use_gloo_comm=True, empty_data=False, return_on_all_ranks=False) -> dict:
    """Master weights and moments of every parameter buffer, gathered over the data-parallel ranks, on the CPU.

    The tensors have the buffer's own coordinates, padding between buckets included, because
    sharded_param_state_fully_reshardable cuts parameters out of them by those. megatron's own leaves the padding out:
    every parameter behind a padded bucket is then saved with its neighbor's state, without a message (0.16.1).
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


DistributedOptimizer.get_parameter_state_dp_zero = get_parameter_state_dp_zero
