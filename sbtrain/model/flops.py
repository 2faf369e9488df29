"""Floating-point operations and parameters by part: what MFU divides by, and what plans add up.

Only useful work is counted: a multiply-add is 2, one row is one document, hidden work (recomputed activations, padding
of heads or vocabulary, intra-chunk products of a chunked kernel, masked tiles, tokens moved between experts) is none.
Norms, activations, rotary embeddings and softmax are left out, as is usual. Training costs 3 forwards: the backward
pass has two products for each of the forward's.

Per token and layer, with D hidden, F ffn, Hq/Hkv heads of size K, visible(n) the mean number of visible keys:

    projections             2 D (Hq + 2 Hkv) K + 2 Hq K D; a pair has them twice unless it shares them
    full attention          4 Hq K visible: scores and weighted values; visible = (T + 1) / 2 + M, M meta tokens
    sliding window          the same with window w: visible = (w (w + 1) / 2 + (T - w) w) / T + M where w < T
    gate (L, low rank)      2 D r + 2 r Hkv K, r the rank of its bottleneck; a tied gate is none
    gated linear attention  Hkv (K V + 2 K V) + Hq 2 K V, V = K: decay of the state and outer product k v per key/value
                            head, product q S per query head. This is the recurrent form of the grouped layout, where
                            the query heads of a group share one state.
    mlp                     6 D F
    router, experts         2 D E of E experts, and 6 D Fe for each of the top_k experts of a token, Fe wide
    shared experts          6 D Fe for each
    lm_head, once           2 D vocab_size

The passage of the meta tokens themselves is left out: it does not depend on the input, so a step needs it once.
"""

from __future__ import annotations

from sbtrain.config.model_schema import Gate, ModelConfig
from sbtrain.config.pattern import LayerKind, parse_pattern

TRAINING_FORWARDS = 3
"""A training step in forwards: 1 forward + 2 for the gradients of inputs and weights."""

_MIXER_PART = {"F": "full_attention", "S": "sliding_window", "L": "gated_linear_attention"}
_FLOPS_PARTS = ("embedding", "projections", "gate", *_MIXER_PART.values(), "mlp", "router", "experts", "shared_experts")
_PARAMETER_PARTS = ("embedding", "meta_tokens", "attention", "gate", "mlp", "router", "experts", "shared_experts")


def visible_keys(seq_len: int, window: int | None = None) -> float:
    """Mean number of keys that a query of a causal document of seq_len tokens sees, itself included."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def flops_per_token(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Forward FLOPs per token by part, summed over the layers, for documents of seq_len tokens.

    Of a mixture of experts the work of the experts that a token goes to: that of its active parameters.
    """
    parts = dict.fromkeys((*_FLOPS_PARTS, "lm_head"), 0.0)
    for kind in parse_pattern(model.pattern, model.num_layers):
        for part, flops in layer_flops(model, kind, seq_len).items():
            parts[part] += flops
    parts["lm_head"] = head_flops_per_token(model)
    return parts


def training_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of one token in training: forward and backward of all parts."""
    return TRAINING_FORWARDS * sum(flops_per_token(model, seq_len).values())


def layer_flops(model: ModelConfig, kind: LayerKind, seq_len: int) -> dict[str, float]:
    """Forward FLOPs per token of one layer by part. kind: mixers of F, S, L, with a dense FFN or experts."""
    hidden, head_dim = model.hidden_size, model.head_dim
    query, key_value = model.num_heads * head_dim, model.num_kv_heads * head_dim
    projections = 2.0 * hidden * (query + 2 * key_value) + 2.0 * query * hidden
    parts = {"projections": num_projections(model, kind) * projections}
    for mixer in kind.mixers:
        if mixer == "L":
            if model.gla.gate is Gate.low_rank:
                parts["gate"] = 2.0 * model.gla.gate_rank * (hidden + key_value)
            elif model.gla.gate is Gate.full_rank:
                parts["gate"] = 2.0 * hidden * key_value
            parts[_MIXER_PART[mixer]] = 3.0 * key_value * head_dim + 2.0 * query * head_dim
        else:
            visible = visible_keys(seq_len, model.window if mixer == "S" else None) + model.meta.num_tokens
            parts[_MIXER_PART[mixer]] = 4.0 * query * visible
    if not kind.moe:
        return {**parts, "mlp": 6.0 * hidden * model.ffn_size}
    expert = 6.0 * hidden * expert_size(model)
    parts["router"] = 2.0 * hidden * model.moe.num_experts
    return {**parts, "experts": model.moe.top_k * expert, "shared_experts": model.moe.num_shared_experts * expert}


def layer_flops_per_token(model: ModelConfig, seq_len: int) -> list[float]:
    """Forward FLOPs per token of every layer: what pipeline stages are balanced by."""
    kinds = parse_pattern(model.pattern, model.num_layers)
    return [sum(layer_flops(model, kind, seq_len).values()) for kind in kinds]


def head_flops_per_token(model: ModelConfig) -> float:
    """Forward FLOPs per token of the output layer."""
    return 2.0 * model.hidden_size * model.vocab_size


def parameters(model: ModelConfig) -> dict[str, int]:
    """Number of parameters by part, of the model as it is built: with the padded vocabulary, tied weights once."""
    parts = dict.fromkeys((*_PARAMETER_PARTS, "norms", "lm_head"), 0)
    for kind in parse_pattern(model.pattern, model.num_layers):
        for part, count in layer_parameters(model, kind).items():
            parts[part] += count
    parts["embedding"] = model.padded_vocab_size * model.hidden_size
    parts["meta_tokens"] = model.meta.num_tokens * model.hidden_size
    parts["norms"] += model.hidden_size
    parts["lm_head"] = 0 if model.tie_embeddings else parts["embedding"]
    return parts


def active_parameters(model: ModelConfig) -> int:
    """Parameters that one token meets: all but the routed experts that it does not go to."""
    parts = parameters(model)
    return sum(parts.values()) - parts["experts"] // model.moe.num_experts * (model.moe.num_experts - model.moe.top_k)


def layer_parameters(model: ModelConfig, kind: LayerKind) -> dict[str, int]:
    """Number of parameters of one layer by part. kind: mixers of F, S, L, with a dense FFN or experts."""
    hidden = model.hidden_size
    parts = {**_attention_parameters(model, kind), **_ffn_parameters(model, kind)}
    parts["norms"] += 2 * hidden
    if "L" in kind.mixers:
        parts["norms"] += model.head_dim
    if model.qk_norm:
        parts["norms"] += 2 * model.head_dim * sum(mixer != "L" for mixer in kind.mixers)
    return parts


def num_projections(model: ModelConfig, kind: LayerKind) -> int:
    """How many sets of q, k, v and output projections a layer has."""
    return 1 if model.pair.shared_projections else len(kind.mixers)


def expert_size(model: ModelConfig) -> int:
    """Width of one expert, in channels."""
    return model.moe.expert_ffn_size or model.ffn_size


def merge_norm_size(model: ModelConfig) -> int:
    """Channels that a pair's branch norm scales: over all heads where it comes before the output projection."""
    return model.num_heads * model.head_dim if model.pair.norms_before_projection else model.hidden_size


def _attention_parameters(model: ModelConfig, kind: LayerKind) -> dict[str, int]:
    hidden, query, key_value = (
        model.hidden_size,
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
    )
    qkv, rank = query + 2 * key_value, model.gla.gate_rank
    projections = hidden * qkv + (qkv if model.qkv_bias else 0) + query * hidden
    parts = {"attention": num_projections(model, kind) * projections, "norms": 0}
    if "L" in kind.mixers and model.gla.gate is Gate.low_rank:
        parts["gate"] = rank * hidden + key_value * rank + key_value
    elif "L" in kind.mixers and model.gla.gate is Gate.full_rank:
        parts["gate"] = key_value * hidden + key_value
    if len(kind.mixers) > 1:
        parts["norms"] = len(kind.mixers) * merge_norm_size(model)
    return parts


def _ffn_parameters(model: ModelConfig, kind: LayerKind) -> dict[str, int]:
    hidden = model.hidden_size
    if not kind.moe:
        return {"mlp": 3 * hidden * model.ffn_size}
    expert, moe = 3 * hidden * expert_size(model), model.moe
    return {
        "router": moe.num_experts * hidden,
        "experts": moe.num_experts * expert,
        "shared_experts": moe.num_shared_experts * expert,
    }
