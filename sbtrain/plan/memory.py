"""Bytes that one rank needs, by part: an estimate from the shape, the layout and the recompute mode.

With P the dense parameters of a rank (tensors of a pipeline stage, divided by tp where tp cuts them), E those of its
routed experts (divided by ep, never by tp), b the bytes of a weight (2 bf16, 4 fp32), t = row tokens / sp + meta tokens
the tokens of a rank, and sizes D hidden, Q and KV all query and key/value channels, F ffn, V padded vocabulary:

    weights       b (P + E)
    gradients     4 (P + E), summed in fp32 whatever the weights are
    optimizer     12 (P / (dp sp) + E / (dp sp tp / ep)) for bf16: fp32 master weights and two moments, ZeRO-1 over the
                  ranks that hold the same tensor; 8 for fp32, which needs no second copy of the weights
    copies        (b + 4) for each parameter of experts.max_copies experts of every mixture on the rank: as many as may
                  be hot at a time, with their gradients in fp32; 0 where none are copied
    activations   b t per layer and row in flight, by recompute mode:
                    none         4 D + [(Q + 2 KV) + (Q + KV) + Q + 3 F] / tp: residual and norms; q, k, v before and
                                 after rotation or ReLU; mixer output; FFN
                    activations  the same without the product of gate and up: 2 F
                    selective    the same without the FFN and its norm: 3 D + [...] / tp
                    full         D, the input of the layer
                  A pair has the mixer's twice, q, k, v once if it shares them, and the two outputs that it merges.
                  L layers also keep the log decay and its logits in fp32: 8 KV / tp bytes a token. Experts take the
                  place of the FFN: 3 F S / tp of S shared ones, and for each of top_k (2 D + 3 F) / tp, with balanced
                  routing; selective keeps the 2 D, copies in and out. Spikes take the place of what a projection
                  reads, but for what others read as it was: Q / tp of F and S mixers (attention keeps its output), D of
                  a router, D where one of the gate and q, k, v spikes. D is divided by tp under tp_sequence_parallel.
                  Pipeline stage i of pp holds min(rows of a step, pp - i) rows in flight; with several chunks what the
                  interleaved order has it hold at its fullest, about (pp (vpp - 1) + 2 (pp - i) - 1) / vpp rows.
    recomputed    one layer without recomputation, less what it keeps: alive while its backward pass runs
    logits        (b + 4) t V / tp on the last stage: the upper bound; a fused loss needs a small part of it

Not counted: the allocator's fragmentation, communication buffers, kernels' workspaces, the device context, a weight's
gradient on its way into the buffer, and what experts receive beyond an even share.
"""

from __future__ import annotations

from parallel.layout import Layout
from parallel.pipeline import most_in_flight, stage_chunks
from sbtrain.config.model_schema import Gate
from sbtrain.config.pattern import LayerKind, parse_pattern
from sbtrain.config.schema import ModelConfig, Precision, Recipe, Recompute, Stage
from sbtrain.model.flops import expert_size, layer_parameters, merge_norm_size, num_projections
from sbtrain.model.stages import pipeline_chunks

GIB = 1024**3


def rank_memory(recipe: Recipe, stage: Stage, *, world_size: int) -> dict[str, float]:
    """Bytes by part on the rank that needs most, under stage.layout. The layout must fit the world."""
    layout = stage.layout
    chunks = [chunk.layers for chunk in pipeline_chunks(recipe.model, layout, seq_len=stage.seq_len)]
    ranks = (
        _pipeline_rank(recipe, stage, stage_chunks(chunks, index, pp=layout.pp), index=index, world_size=world_size)
        for index in range(layout.pp)
    )
    return max(ranks, key=lambda parts: sum(parts.values()))


def rank_parameters(model: ModelConfig, layout: Layout, layers: range) -> float:
    """Parameters that a rank holds of the given layers, with the embedding and the head where they belong."""
    return dense_parameters(model, layout, layers) + expert_parameters(model, layout, layers)


def dense_parameters(model: ModelConfig, layout: Layout, layers: range) -> float:
    """Those of a rank's parameters that all data-parallel ranks hold: all but the routed experts."""
    kinds = parse_pattern(model.pattern, model.num_layers)
    vocabulary = model.padded_vocab_size * model.hidden_size / layout.tp
    count = sum(_layer_share(model, kinds[i], layout.tp) for i in layers)
    first, last = layers.start == 0, layers.stop == model.num_layers
    count += vocabulary + model.meta.num_tokens * model.hidden_size if first else 0
    count += model.hidden_size if last else 0
    return count + (vocabulary if last and not (first and model.tie_embeddings) else 0)


def expert_parameters(model: ModelConfig, layout: Layout, layers: range) -> float:
    """Parameters of the routed experts that a rank holds: experts are cut by ep, whole on a tp rank."""
    kinds = parse_pattern(model.pattern, model.num_layers)
    return sum(layer_parameters(model, kinds[i]).get("experts", 0) for i in layers) / layout.ep


def checkpoint_bytes(recipe: Recipe, *, optimizer: bool = True) -> int:
    """Bytes of one checkpoint: the weights and, with the optimizer, their fp32 master copies and two moments."""
    model = recipe.model
    count = rank_parameters(model, Layout(), range(model.num_layers))
    return round((_element_bytes(recipe.precision) + (12 if optimizer else 0)) * count)


def layer_activation_bytes(
    model: ModelConfig, layer: int, kind: LayerKind, layout: Layout, *, recompute: Recompute, precision: Precision
) -> float:
    """Bytes per token that one layer, 0-based and of this kind, keeps for its backward pass."""
    element = _element_bytes(precision)
    residual = model.hidden_size / (layout.tp if layout.tp_sequence_parallel else 1)
    if recompute is Recompute.full:
        return element * residual
    key_value = model.num_kv_heads * model.head_dim
    mixer = _mixer_channels(model, kind) / layout.tp
    if len(kind.mixers) > 1:
        mixer += 2 * (merge_norm_size(model) / layout.tp if model.pair.norms_before_projection else residual)
    mixer += _channels_beside_spikes(model, layer, kind, tp=layout.tp, residual=residual)
    gate = 8 * key_value / layout.tp if "L" in kind.mixers else 0
    sent = 2 * model.hidden_size * model.moe.top_k / layout.tp if kind.moe else 0
    if recompute is Recompute.selective:
        return element * (3 * residual + mixer + sent) + gate
    kept = (2 if recompute is Recompute.activations else 3) * _ffn_channels(model, kind) / layout.tp
    return element * (4 * residual + mixer + sent + kept) + gate


def _channels_beside_spikes(model: ModelConfig, layer: int, kind: LayerKind, *, tp: int, residual: float) -> float:
    """Channels of a token that are kept both as they were and as spikes."""
    spiking, channels = model.spiking, 0.0
    normed = len(kind.mixers) > 1 and model.pair.norms_before_projection  # attention's output is not what spikes
    if spiking.spikes("proj", layer) and not normed:
        channels += sum(mixer in "FS" for mixer in kind.mixers) * model.num_heads * model.head_dim / tp
    if "L" in kind.mixers and model.gla.gate is not Gate.tied:
        channels += residual * (spiking.spikes("gate", layer) != spiking.spikes("qkv", layer))
    return channels + residual * (kind.moe and spiking.spikes("gate_up", layer))


def _mixer_channels(model: ModelConfig, kind: LayerKind) -> float:
    """q, k, v of the projections; q and k with rotation or features and the output, of each mixer."""
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return num_projections(model, kind) * (query + 2 * key_value) + len(kind.mixers) * (2 * query + key_value)


def _ffn_channels(model: ModelConfig, kind: LayerKind) -> int:
    """Channels of the FFNs that a token meets."""
    if not kind.moe:
        return model.ffn_size
    return (model.moe.num_shared_experts + model.moe.top_k) * expert_size(model)


def _pipeline_rank(
    recipe: Recipe, stage: Stage, chunks: list[range], *, index: int, world_size: int
) -> dict[str, float]:
    model, layout, precision = recipe.model, stage.layout, recipe.precision
    every = parse_pattern(model.pattern, model.num_layers)
    kinds = [every[i] for layers in chunks for i in layers]
    element, dp = _element_bytes(precision), layout.dp(world_size)
    num_tokens = stage.row_tokens / layout.sp + model.meta.num_tokens
    dense, experts = (
        sum(count(model, layout, layers) for layers in chunks) for count in (dense_parameters, expert_parameters)
    )
    owned = dense / (dp * layout.sp) + experts / (dp * layout.sp * layout.tp / layout.ep)

    def kept(layer: int, recompute: Recompute) -> float:
        how = dict(recompute=recompute, precision=precision)
        return num_tokens * layer_activation_bytes(model, layer, every[layer], layout, **how)

    last = chunks[-1].stop == model.num_layers
    of_a_row = [sum(kept(layer, stage.recompute) for layer in layers) for layers in chunks]
    return {
        "weights": element * (dense + experts),
        "gradients": 4 * (dense + experts),
        "optimizer": (12 if precision is Precision.bf16 else 8) * owned,
        **_copies(recipe, stage, kinds),
        "activations": most_in_flight(of_a_row, pp=layout.pp, stage=index, num_rows=stage.num_rows // dp),
        "recomputed": max(
            kept(layer, Recompute.none) - kept(layer, stage.recompute) for layers in chunks for layer in layers
        ),
        "logits": (element + 4) * num_tokens * model.padded_vocab_size / layout.tp if last else 0.0,
    }


def _copies(recipe: Recipe, stage: Stage, kinds: list[LayerKind]) -> dict[str, float]:
    """Bytes of the copies of hot experts where the stage makes any."""
    model, each = recipe.model, _element_bytes(recipe.precision) + 4
    count = stage.experts.max_copies * sum(kind.moe for kind in kinds)
    return {"copies": each * count * 3 * model.hidden_size * expert_size(model)} if count else {}


def _layer_share(model: ModelConfig, kind: LayerKind, tp: int) -> float:
    """Dense parameters of one layer on one tp rank: norms, router and the bottleneck of the gate are whole on each."""
    parts = layer_parameters(model, kind)
    parts.pop("experts", None)
    whole = parts["norms"] + parts.get("router", 0)
    if len(kind.mixers) > 1 and model.pair.norms_before_projection:  # these are cut with the heads that they scale
        whole -= len(kind.mixers) * merge_norm_size(model)
    if "gate" in parts and model.gla.gate is Gate.low_rank:
        whole += model.gla.gate_rank * model.hidden_size
    return whole + (sum(parts.values()) - whole) / tp


def _element_bytes(precision: Precision) -> int:
    return 2 if precision is Precision.bf16 else 4
