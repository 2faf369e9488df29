"""Engine: one model on one layout, trained by megatron's schedules and optimizer.

Gradient accumulation, pipeline schedules, gradient reduction and loss weighting happen in here; the caller hands over
rows and gets sums of losses back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import mcore
from parallel.mesh import Mesh
from parallel.optimizer import build_optimizer, own_step_counts, prepare_for_loading, set_learning_rate
from parallel.sequence.shard import IGNORE, Row, shard_row

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True}


@dataclass(frozen=True)
class LossSum:
    """Sum of token losses in nats over all ranks and rows, and the number of scored tokens."""

    loss: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Nats per scored token; 0 if none was scored."""
        return self.loss / max(self.num_tokens, 1)


class Engine:
    """Owns the model, its gradients and its optimizer for the life of one mesh."""

    def __init__(self, model, mesh: Mesh, *, adam: dict):
        """model: this rank's stage, on its device, weights still to be set. adam: arguments of build_optimizer."""
        self.mesh, self.model, self.config = mesh, model, model.config
        on_gpu = mesh.device.type == "cuda"
        ddp = mcore.DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=on_gpu,
            overlap_param_gather=False,
        )
        self.chunk = mcore.DistributedDataParallel(self.config, ddp, model)
        if on_gpu:
            self.config.no_sync_func = self.chunk.no_sync
        self.config.finalize_model_grads_func = mcore.finalize_model_grads
        self.optimizer = build_optimizer([self.chunk], **adam)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self._schedule = mcore.get_forward_backward_func()

    def weights_changed(self) -> None:
        """Call after writing into the model's parameters: the fp32 master copies follow them."""
        self.optimizer.reload_model_params()

    def forward_backward(self, rows: list[Row]) -> LossSum:
        """Loss and gradients of one step from this data-parallel rank's rows (equal in length and number on all ranks).

        Every gradient ends as the derivative of the mean over all scored tokens of the global batch.
        """
        self.chunk.train()
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return _total(self._run(rows, forward_only=False), self.mesh)

    def gather_gradients(self) -> None:
        """Make param.main_grad whole on every rank after forward_backward, for inspection: ZeRO leaves each a part."""
        group = self.mesh.groups.dp_cp
        for buffer in self.chunk.buffers:
            for bucket in buffer.buckets:
                parts = bucket.grad_data.chunk(group.size())
                dist.all_gather(list(parts), parts[group.rank()].clone(), group=group)

    def step(self, *, lr: float) -> float:
        """Clip, update the weights with this learning rate, and return the gradient norm before clipping."""
        set_learning_rate(self.optimizer, lr)
        _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm)

    @torch.no_grad()
    def evaluate(self, rows: list[Row]) -> list[LossSum]:
        """The loss of each of this rank's rows, without gradients; rows are not summed over data-parallel ranks."""
        self.chunk.eval()
        sums = self._run(rows, forward_only=True)
        self.chunk.train()
        sums = _on_every_stage(sums, len(rows), self.mesh)
        dist.all_reduce(sums, group=self.mesh.groups.cp)
        return [LossSum(float(loss), int(num_tokens)) for loss, num_tokens in sums.tolist()]

    def sharded_state_dict(self, *, for_loading: bool = False) -> dict:
        """Model and optimizer as megatron's sharded state dict; for_loading also allocates the optimizer's state."""
        metadata = {**_SHARDING, "dp_cp_group": self.mesh.groups.dp_cp}
        if for_loading:
            prepare_for_loading(self.optimizer)
        model = self.model.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=for_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict) -> None:
        """Take over what dist_checkpointing loaded into the sharded state dict of this engine."""
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            self.optimizer.load_state_dict(state["optimizer"])
        own_step_counts(self.optimizer)

    def _run(self, rows: list[Row], *, forward_only: bool) -> list[Tensor]:
        num_tokens = {row.tokens.shape[0] for row in rows}
        assert len(num_tokens) == 1, f"rows of one step must be equally long, got {sorted(num_tokens)}"
        return self._schedule(
            forward_step_func=self._forward_step,
            data_iterator=iter(rows),
            model=self.chunk,
            num_microbatches=len(rows),
            seq_length=num_tokens.pop(),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward_step(self, rows, chunk):
        row = next(rows)
        device = self.mesh.device
        row = Row(*(x.to(device, non_blocking=True) for x in (row.tokens, row.labels, row.cu_seqlens)))
        tokens, labels, documents = shard_row(row, rank=self.mesh.sp_rank, size=self.mesh.layout.sp)
        return chunk(tokens, documents, labels), partial(_token_sums, labels)


def _token_sums(labels: Tensor, losses: Tensor):
    """What megatron's schedule wants of the last stage: the loss to differentiate, the scored tokens, what to report."""
    num_tokens = (labels != IGNORE).sum()
    loss = losses.sum()
    return loss, num_tokens.to(torch.int), torch.stack([loss.detach().double(), num_tokens.double()])


def _on_every_stage(sums: list[Tensor], num_rows: int, mesh: Mesh) -> Tensor:
    """[rows, 2] of (loss, tokens), known on the last stage, sent to the others of the pipeline."""
    table = torch.stack(sums) if sums else torch.zeros(num_rows, 2, dtype=torch.float64, device=mesh.device)
    if mesh.layout.pp > 1:
        group = mesh.groups.pp
        dist.broadcast(table, src=dist.get_process_group_ranks(group)[-1], group=group)
    return table


def _total(sums: list[Tensor], mesh: Mesh) -> LossSum:
    table = _on_every_stage([torch.stack(sums).sum(0)] if sums else [], 1, mesh)[0]
    dist.all_reduce(table, group=mesh.groups.dp_cp)
    loss, num_tokens = table.tolist()
    return LossSum(loss, int(num_tokens))
