"""Floating-point operations and parameters by part: what MFU divides by, and what plans add up.

Only useful work is counted: a multiply-add is 2, one row is one document, hidden work (recomputed activations, padding
of heads or vocabulary, intra-chunk products of a chunked kernel, masked tiles) is none. Norms, activations, rotary
embeddings and softmax are left out, as is usual. Training costs 3 forwards: the backward pass has two products for
each of the forward's.

Per token and layer, with D hidden, F ffn, Hq/Hkv heads of size K, visible(n) the mean number of visible keys:

    projections             2 D (Hq + 2 Hkv) K + 2 Hq K D
    full attention          4 Hq K visible: scores and weighted values; visible = (T + 1) / 2
    sliding window          the same with window w: visible = (w (w + 1) / 2 + (T - w) w) / T where w < T
    gate (L)                2 D r + 2 r Hkv K, r the rank of its bottleneck
    gated linear attention  Hkv (K V + 2 K V) + Hq 2 K V, V = K: decay of the state and outer product k v per key/value
                            head, product q S per query head. This is the recurrent form of the grouped layout, where
                            the query heads of a group share one state.
    mlp                     6 D F
    lm_head, once           2 D vocab_size
"""

from __future__ import annotations

from sbtrain.config.pattern import LayerKind, parse_pattern
from sbtrain.config.schema import ModelConfig

TRAINING_FORWARDS = 3
"""A training step in forwards: 1 forward + 2 for the gradients of inputs and weights."""

_MIXER_PART = {"F": "full_attention", "S": "sliding_window", "L": "gated_linear_attention"}


def visible_keys(seq_len: int, window: int | None = None) -> float:
    """Mean number of keys that a query of a causal document of seq_len tokens sees, itself included."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def flops_per_token(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Forward FLOPs per token by part, summed over the layers, for documents of seq_len tokens."""
    parts = dict.fromkeys(
        (
            "embedding",
            "projections",
            "gate",
            "full_attention",
            "sliding_window",
            "gated_linear_attention",
            "mlp",
            "lm_head",
        ),
        0.0,
    )
    for kind in parse_pattern(model.pattern, model.num_layers):
        for part, flops in layer_flops(model, kind, seq_len).items():
            parts[part] += flops
    parts["lm_head"] = head_flops_per_token(model)
    return parts


def training_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of one token in training: forward and backward of all parts."""
    return TRAINING_FORWARDS * sum(flops_per_token(model, seq_len).values())


def layer_flops(model: ModelConfig, kind: LayerKind, seq_len: int) -> dict[str, float]:
    """Forward FLOPs per token of one layer by part. kind: one mixer of F, S, L with a dense FFN."""
    mixer = _only_mixer(kind)
    hidden, head_dim = model.hidden_size, model.head_dim
    query, key_value = model.num_heads * head_dim, model.num_kv_heads * head_dim
    parts = {"projections": 2.0 * hidden * (query + 2 * key_value) + 2.0 * query * hidden}
    if mixer == "L":
        parts["gate"] = 2.0 * model.gla.gate_rank * (hidden + key_value)
        parts[_MIXER_PART[mixer]] = 3.0 * key_value * head_dim + 2.0 * query * head_dim
    else:
        parts[_MIXER_PART[mixer]] = 4.0 * query * visible_keys(seq_len, model.window if mixer == "S" else None)
    parts["mlp"] = 6.0 * hidden * (active_ffn_size(model) if kind.moe else model.ffn_size)
    if kind.moe:
        parts["mlp"] += 2.0 * hidden * model.moe.num_experts
    return parts


def active_ffn_size(model: ModelConfig) -> int:
    """Channels of the experts that one token goes to, shared ones included."""
    moe = model.moe
    return (moe.top_k + moe.num_shared_experts) * (moe.expert_ffn_size or model.ffn_size)


def layer_flops_per_token(model: ModelConfig, seq_len: int) -> list[float]:
    """Forward FLOPs per token of every layer: what pipeline stages are balanced by."""
    kinds = parse_pattern(model.pattern, model.num_layers)
    return [sum(layer_flops(model, kind, seq_len).values()) for kind in kinds]


def head_flops_per_token(model: ModelConfig) -> float:
    """Forward FLOPs per token of the output layer."""
    return 2.0 * model.hidden_size * model.vocab_size


def parameters(model: ModelConfig) -> dict[str, int]:
    """Number of parameters by part, of the model as it is built: with the padded vocabulary, tied weights once."""
    parts = dict.fromkeys(("embedding", "attention", "gate", "mlp", "norms", "lm_head"), 0)
    for kind in parse_pattern(model.pattern, model.num_layers):
        for part, count in layer_parameters(model, kind).items():
            parts[part] += count
    parts["embedding"] = model.padded_vocab_size * model.hidden_size
    parts["norms"] += model.hidden_size
    parts["lm_head"] = 0 if model.tie_embeddings else parts["embedding"]
    return parts


def layer_parameters(model: ModelConfig, kind: LayerKind) -> dict[str, int]:
    """Number of parameters of one layer by part. kind: one mixer of F, S, L with a dense FFN."""
    mixer = _only_mixer(kind)
    hidden, head_dim, rank = model.hidden_size, model.head_dim, model.gla.gate_rank
    query, key_value = model.num_heads * head_dim, model.num_kv_heads * head_dim
    qkv = query + 2 * key_value
    parts = {
        "attention": hidden * qkv + (qkv if model.qkv_bias else 0) + query * hidden,
        "mlp": 3 * hidden * model.ffn_size,
        "norms": 2 * hidden,
    }
    if mixer == "L":
        parts["gate"] = rank * hidden + key_value * rank + key_value
        parts["norms"] += head_dim
    elif model.qk_norm:
        parts["norms"] += 2 * head_dim
    if kind.moe:
        moe = model.moe
        width = (moe.num_experts + moe.num_shared_experts) * (moe.expert_ffn_size or model.ffn_size)
        parts["mlp"] = 3 * hidden * width + moe.num_experts * hidden
    return parts


def _only_mixer(kind: LayerKind) -> str:
    """The mixer of a layer that can be trained; `config.rules` has refused all others."""
    assert len(kind.mixers) == 1 and kind.mixers[0] in _MIXER_PART, kind
    return kind.mixers[0]
