"""How strong the attention outputs of the unconverted model are: what the branch norms of pairs start from.

The mean over all tokens of the root mean square of each layer's attention output: behind the output projection where
the branch norms of pairs come behind it, before it where they come before it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.place import primitive
from parallel.schedule import chunks_of, in_rounds, run_rows
from parallel.sequence.shard import Row
from parallel.sequence.ulysses import heads_problem
from sbtrain.config.model_schema import ModelConfig
from sbtrain.config.spiking_schema import SpikingConfig


def teacher_of(model: ModelConfig, layout: Layout, *, seq_len: int) -> ModelConfig:
    """The model that start.path holds: full attention and a dense FFN in every layer, no meta tokens, no spikes.

    seq_len: of the longest document. Where key/value heads cannot be dealt over layout.sp, as full attention needs, its
    layers are windows of seq_len tokens: the same numbers, carried by halos.
    """
    problem = heads_problem(num_kv_heads=model.num_kv_heads // layout.tp, sp=layout.sp)
    plain = dict(meta=replace(model.meta, num_tokens=0), spiking=SpikingConfig())
    return replace(model, pattern="S" if problem else "F", window=seq_len, **plain)


@torch.no_grad()
def output_strengths(teacher, mesh: Mesh, rows: list[Row], *, before_projection: bool) -> dict[int, float]:
    """The mean token RMS of each layer's attention output, by 0-based global index, the same on every rank. Collective.

    teacher: this rank's stage, or its chunks, of a model with one mixer in every layer. rows: the same on every rank;
    they are dealt over the data-parallel ranks, and the result does not depend on the layout.
    """
    mine, counts = dealt(rows, mesh)
    chunks = chunks_of(teacher)
    num_layers = chunks[0].model_config.num_layers
    sums = torch.zeros(num_layers, 2, dtype=torch.float64, device=mesh.device)
    with ExitStack() as stack:
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            seen = iter(counts)
            if before_projection:
                handle = layer.self_attention.linear_proj.register_forward_pre_hook(
                    lambda module, args, index=layer.index, seen=seen: _add(
                        sums[index], args[0], next(seen), heads=mesh.groups.tp
                    )
                )
            else:
                handle = layer.self_attention.register_forward_hook(
                    lambda module, args, output, index=layer.index, seen=seen: _add(sums[index], output, next(seen))
                )
            stack.callback(handle.remove)
        for chunk in chunks:
            stack.callback(chunk.train, chunk.training)
            chunk.eval()
        run_rows(chunks, mesh, mine)
    # the tp ranks see the same tokens of a layer's output, unless it is theirs that tp_sequence_parallel cuts
    cut_by_tp = mesh.layout.tp_sequence_parallel and not before_projection
    total_over_ranks(sums, mesh, tp=cut_by_tp)
    return {index: (total / count).item() for index, (total, count) in enumerate(sums)}


def dealt(rows: list[Row], mesh: Mesh) -> tuple[list[Row], list[bool]]:
    """This data-parallel rank's share of the rows, and which of them count: some run one again to be equally many."""
    places = range(mesh.dp_rank, in_rounds(-(-len(rows) // mesh.dp), mesh) * mesh.dp, mesh.dp)
    return [rows[min(i, len(rows) - 1)] for i in places], [i < len(rows) for i in places]


def total_over_ranks(sums: Tensor, mesh: Mesh, *, tp: bool) -> None:
    """Add up, in place, what ranks have counted of their tokens and layers. tp: whether tp ranks had their own."""
    with primitive("sums over ranks"):
        for group in (mesh.groups.dp_cp, mesh.groups.pp, *([mesh.groups.tp] if tp else [])):
            dist.all_reduce(sums, group=group)


def _add(total: Tensor, x: Tensor, counts: bool, *, heads=None) -> None:
    """Add the RMS of each of x's tokens, [T,1,C], and their number. heads: the group whose ranks hold parts of C."""
    squares, channels = x.double().square().sum(-1), x.shape[-1]
    if heads is not None and heads.size() > 1:
        dist.all_reduce(squares, group=heads)
        channels *= heads.size()
    if counts:
        total += torch.stack([(squares / channels).sqrt().sum(), squares.new_tensor(squares.numel())])
