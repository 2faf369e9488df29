"""Rows through a model on its layout: megatron's schedules, and the sums of losses that come back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import mcore
from parallel.mesh import Mesh
from parallel.place import primitive, section
from parallel.sequence.shard import IGNORE, Row, shard_row


@dataclass(frozen=True)
class LossSum:
    """Sum of token losses in nats and the number of scored tokens."""

    loss: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Nats per scored token; 0 if none was scored."""
        return self.loss / max(self.num_tokens, 1)


def run_rows(model, mesh: Mesh, rows: list[Row], *, loss_scale: float | None = None) -> Tensor:
    """Run this data-parallel rank's rows, equally many and long on every rank.

    loss_scale: gradients are those of the summed loss times this; None runs the forward pass alone.

    model: a stage of the model or the list of its chunks, wrapped for data parallelism or not; with several chunks the
    number of rows is a multiple of layout.pp (in_rounds). Returns fp64 [rows, 2] of (summed loss, scored tokens) of
    this rank's shard of each row, the same on all pipeline stages.
    """
    chunks = chunks_of(model)
    num_tokens = {row.tokens.shape[0] for row in rows}
    assert len(num_tokens) == 1, f"rows of one step must be equally long, got {sorted(num_tokens)}"
    sums = mcore.get_forward_backward_func()(
        forward_step_func=partial(_forward_step, mesh=mesh, loss_scale=loss_scale or 0.0),
        data_iterator=[iter(rows) for _ in chunks],
        model=chunks,
        num_microbatches=len(rows),
        seq_length=tokens_between_stages(chunks[0], mesh, num_tokens.pop()),
        micro_batch_size=1,
        forward_only=loss_scale is None,
    )
    table = torch.stack(sums) if sums else torch.zeros(len(rows), 2, dtype=torch.float64, device=mesh.device)
    if mesh.layout.pp > 1:
        group = mesh.groups.pp
        with primitive("losses of the last stage"):
            dist.broadcast(table, src=dist.get_process_group_ranks(group)[-1], group=group)
    return table


def chunks_of(model) -> list:
    """A stage of the model as the list of its chunks."""
    return list(model) if isinstance(model, (list, tuple)) else [model]


def in_rounds(num_rows: int, mesh: Mesh) -> int:
    """num_rows rounded up to what a data-parallel rank can run: with several chunks a stage, a multiple of pp."""
    at_once = mesh.layout.pp if mesh.layout.vpp > 1 else 1
    return -(-num_rows // at_once) * at_once


def tokens_between_stages(model, mesh: Mesh, num_tokens: int) -> int:
    """Rows of the sp ranks' hidden states together, which megatron cuts over sp: each has its own meta tokens."""
    return num_tokens + mesh.layout.sp * getattr(model, "module", model).num_meta


@torch.no_grad()
def evaluate_rows(model, mesh: Mesh, rows: list[Row]) -> list[LossSum]:
    """The loss of each row, without gradients. Every rank passes the same rows and gets the same answer.

    model: as run_rows takes it. Rows are dealt over the data-parallel ranks; ranks that get fewer run a row again
    without counting it.
    """
    num_rounds = in_rounds(-(-len(rows) // mesh.dp), mesh)
    mine = [rows[min(i * mesh.dp + mesh.dp_rank, len(rows) - 1)] for i in range(num_rounds)]
    chunks = chunks_of(model)
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    sums = run_rows(chunks, mesh, mine)
    for chunk in chunks:
        chunk.train(was_training)
    table = torch.zeros(num_rounds, mesh.dp, 2, dtype=torch.float64, device=mesh.device)
    table[:, mesh.dp_rank] = sums
    with primitive("losses of all ranks"):
        dist.all_reduce(table, group=mesh.groups.dp_cp)
        return [LossSum(loss, int(num_tokens)) for loss, num_tokens in table.flatten(0, 1)[: len(rows)].tolist()]


def _forward_step(rows, model, *, mesh: Mesh, loss_scale: float):
    row = next(rows)
    tokens, labels, documents = shard_row(row.to(mesh.device), rank=mesh.sp_rank, size=mesh.layout.sp)
    with section("forward"):
        return model(tokens, documents, labels), partial(_token_sums, labels, loss_scale)


def _token_sums(labels: Tensor, loss_scale: float, losses: Tensor):
    """What megatron's schedule wants of the last stage: the loss to differentiate, scored tokens, what to report."""
    num_tokens = (labels != IGNORE).sum()
    loss = losses.sum()
    return loss * loss_scale, num_tokens.to(torch.int), torch.stack([loss.detach().double(), num_tokens.double()])
