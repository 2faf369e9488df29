"""Logits of a model on a layout, through the pipeline schedule, and put together again from the ranks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from parallel import mcore
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.schedule import tokens_between_stages
from parallel.sequence.shard import IGNORE, Row, shard_row
from sbtrain.config.schema import ModelConfig, Precision
from sbtrain.convert.start import fill
from sbtrain.model.build import build_model, global_parameters
from sharding import global_state, local_shard


def as_row(tokens: Tensor, cu_seqlens: Tensor | None = None) -> Row:
    """A row of tokens [T] whose labels are the next token of the same document."""
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    labels = torch.cat([tokens[1:], tokens.new_full((1,), IGNORE)])
    ends = cu_seqlens[1:].long() - 1
    labels[ends[ends >= 0]] = IGNORE
    return Row(tokens, labels, cu_seqlens)


def fill_random(model, config: ModelConfig, mesh: Mesh, *, seed: int = 0) -> None:
    """Set this rank's parameters from global_state(config, seed)."""
    state, before = global_state(config, seed=seed), config.pair.norms_before_projection
    for name, parameter in global_parameters(model).items():
        source = "embedding.word_embeddings.weight" if name == "output_layer.weight" and config.tie_embeddings else name
        with torch.no_grad():
            where = dict(tp_rank=mesh.tp_rank, tp=mesh.layout.tp, norms_before_projection=before)
            parameter.copy_(local_shard(name, state[source], **where))


def fill_from(model, config: ModelConfig, mesh: Mesh, path: str) -> None:
    """Set this rank's parameters from a Hugging Face folder."""
    fill(global_parameters(model), model=config, path=path, seed=3, tp_rank=mesh.tp_rank, tp=mesh.layout.tp)


@torch.no_grad()
def forward_rows(model, mesh: Mesh, rows: list[Row]) -> list[Tensor]:
    """This rank's shard of the logits of each row [T/sp, vocab]; [] on inner pipeline stages."""

    def step(iterator, model):
        tokens, _, documents = shard_row(next(iterator), rank=mesh.sp_rank, size=mesh.layout.sp)
        return model(tokens, documents), lambda logits, non_loss_data: logits

    model.eval()
    return mcore.get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(rows),
        model=model,
        num_microbatches=len(rows),
        seq_length=tokens_between_stages(model, mesh, len(rows[0].tokens)),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def logits_on(
    rank: int, layout: Layout, config: ModelConfig, rows: list[Row], path: str | None = None
) -> tuple[tuple[int, int, int], list[Tensor]]:
    """One rank: its (dp, sp, tp) coordinates and its logits of every row. path: weights; None draws random ones."""
    with Mesh.build(layout) as mesh:
        model = build_model(config, mesh, precision=Precision.fp32, seq_len=len(rows[0].tokens))
        set_weights = fill_random if path is None else partial(fill_from, path=path)
        set_weights(model, config, mesh)
        return (mesh.dp_rank, mesh.sp_rank, mesh.tp_rank), forward_rows(model, mesh, rows)


def whole_logits(results: list) -> list[Tensor]:
    """The logits [T, vocab] of every row. All tensor- and data-parallel ranks must agree to the bit."""
    shards = {place: logits for place, logits in results if logits}
    copies = []
    for dp, tp in sorted({(dp, tp) for dp, _, tp in shards}):
        parts = [shards[place] for place in sorted(shards) if (place[0], place[2]) == (dp, tp)]
        copies.append([torch.cat(row) for row in zip(*parts)])
    for copy in copies[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(copy, copies[0], strict=True))
    return copies[0]
