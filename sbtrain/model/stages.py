"""Which layers of a model run where in the pipeline of a layout, and what each part of it costs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from parallel.layout import Layout
from parallel.pipeline import ranges_between, split_layers
from sbtrain.config.model_schema import ModelConfig
from sbtrain.config.pattern import LayerKind, parse_pattern
from sbtrain.model.flops import flops_per_token, layer_flops_per_token


@dataclass(frozen=True)
class Chunk:
    """A run of layers that one pipeline stage holds, with the embedding before the first and the head after the last.

    layers: 0-based. kinds: theirs. flops: forward FLOPs per token of all of it.
    """

    layers: range
    kinds: tuple[LayerKind, ...]
    has_embedding: bool
    has_head: bool
    flops: float


def pipeline_chunks(model: ModelConfig, layout: Layout, *, seq_len: int) -> list[Chunk]:
    """The pp·vpp chunks in the order of the layers; chunk c of stage s is number c·pp + s.

    layout.pp_layers says how many layers each has; without it they are balanced by the FLOPs of their mixers and FFNs
    (of a mixture of experts those that a token goes to), with embedding and head where they are.
    seq_len: of a document, in tokens. Raises ValueError when there are fewer layers than chunks.
    """
    kinds = parse_pattern(model.pattern, model.num_layers)
    costs = layer_flops_per_token(model, seq_len)
    whole = flops_per_token(model, seq_len)
    ends = {"first_extra": whole["embedding"], "last_extra": whole["lm_head"]}
    if layout.pp_layers:
        layers = ranges_between(list(accumulate(layout.pp_layers)))
    else:
        layers = split_layers(costs, pp=layout.pp, vpp=layout.vpp, **ends)
    return [_chunk(part, kinds, costs, **ends) for part in layers]


def _chunk(
    layers: range, kinds: list[LayerKind], costs: list[float], *, first_extra: float, last_extra: float
) -> Chunk:
    has_embedding, has_head = layers.start == 0, layers.stop == len(kinds)
    flops = sum(costs[i] for i in layers) + first_extra * has_embedding + last_extra * has_head
    return Chunk(layers, tuple(kinds[i] for i in layers), has_embedding, has_head, flops)
