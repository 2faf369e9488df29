"""The pipeline of a stage as a table: which layers run where, what they cost, and how even that is."""

from __future__ import annotations

from collections import Counter

from parallel.layout import Layout
from parallel.pipeline import BACKWARD, stage_chunks, step_time
from sbtrain.config.schema import ModelConfig, Stage
from sbtrain.model.stages import Chunk, pipeline_chunks
from sbtrain.plan.memory import rank_parameters
from sbtrain.plan.table import table


def pipeline_table(model: ModelConfig, stage: Stage, *, dp: int) -> str:
    """One line a pipeline stage, or a chunk of one; then what is lost to uneven stages and to the ends of a step.

    dp: data-parallel ranks. Costs are shares of the model's FLOPs at stage.seq_len.
    """
    layout, num_rows = stage.layout, stage.num_rows // dp
    chunks = pipeline_chunks(model, layout, seq_len=stage.seq_len)
    total = sum(chunk.flops for chunk in chunks)
    rows = [
        (str(index), str(number), *_columns(model, chunk, total))
        for index in range(layout.pp)
        for number, chunk in enumerate(stage_chunks(chunks, index, pp=layout.pp))
    ]
    header = ("stage", "chunk", "layers", "holds", "cost", "parameters")
    left = (2, 3)
    if layout.vpp == 1:
        header, rows, left = _without_chunk(header), [_without_chunk(row) for row in rows], (1, 2)
    split = "as layout.pp_layers says" if layout.pp_layers else "balanced by FLOPs"
    return "\n".join(
        [f"  pipeline, {split}", table(header, rows, left=left, indent=2), f"  {_evenness(chunks, layout, num_rows)}"]
    )


def _columns(model: ModelConfig, chunk: Chunk, total: float) -> tuple[str, ...]:
    layers = chunk.layers
    numbers = f"{layers.start}" if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"
    held = ["embedding"] * chunk.has_embedding
    held += [f"{count} {symbol}" for symbol, count in Counter(kind.symbol for kind in chunk.kinds).items()]
    held += ["head"] * chunk.has_head
    parameters = rank_parameters(model, Layout(), layers)
    return numbers, ", ".join(held), f"{100 * chunk.flops / total:.1f} %", f"{parameters:,.0f}"


def _evenness(chunks: list[Chunk], layout: Layout, num_rows: int) -> str:
    costs = [chunk.flops for chunk in chunks]
    mean = sum(costs) / layout.pp
    dearest = max(sum(stage_chunks(costs, index, pp=layout.pp)) for index in range(layout.pp))
    busy = mean * (1 + BACKWARD) * num_rows / step_time(costs, pp=layout.pp, num_rows=num_rows)
    return (
        f"dearest stage {dearest / mean:.2f} of the mean; with {num_rows} rows a step the stages work "
        f"{100 * busy:.1f} % of the time, if sending takes none"
    )


def _without_chunk(row: tuple[str, ...]) -> tuple[str, ...]:
    return row[0], *row[2:]
