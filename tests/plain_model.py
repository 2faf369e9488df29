"""The model in plain torch, written from the maths alone: what imports, exports and the engine are compared with.

Nothing here is shared with the code under test. It is slow on purpose: the linear attention is the recurrence, token
by token, and every document is run by itself. Arithmetic is done in the dtype of the state (use float64 to judge).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sbtrain.config.model_schema import FeatureMap, Gate, MergePlace, MetaPositions, RouterScore
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.schema import ModelConfig


def plain_logits(
    state: dict[str, Tensor], model: ModelConfig, tokens: Tensor, cu_seqlens: Tensor | None = None, share: float = 1.0
):
    """Logits [T, vocab] of a row tokens [T] (or [B, T, vocab] of [B, T], each row by itself).

    state: tensors under the names of the Hugging Face source family (Qwen2, Qwen3, Llama), and for every L layer i
        model.layers.{i}.self_attn.gk_proj.0.weight [rank, D], .gk_proj.1.weight [Hkv*hd, rank], .gk_proj.1.bias (or
        gk_proj.weight [Hkv*hd, D] and gk_proj.bias where the gate is full_rank)
        and model.layers.{i}.self_attn.g_norm.weight [hd]. Without lm_head.weight the embedding is used.
        A pair has la_q_proj, swa_q_proj (of S) or fa_q_proj (of F) and so on for each branch, or one q_proj and so
        on for both, and la_merge_norm, swa_merge_norm or fa_merge_norm; of meta tokens, model.meta_tokens [M, D].
        A mixture of experts has mlp.router.weight [E, D] (and router.expert_bias [E]), mlp.experts.{j}.gate_proj and so
        on, and mlp.shared_expert.gate_proj and so on, the shared experts side by side.
    cu_seqlens: [N+1] boundaries of the documents of each row; None means one document.
    share: how much of an activation is replaced where the model spikes.
    """
    if tokens.dim() == 2:
        return torch.stack([plain_logits(state, model, row, cu_seqlens, share) for row in tokens])
    bounds = [0, tokens.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    documents = [tokens[start:stop] for start, stop in zip(bounds, bounds[1:]) if stop > start]
    return torch.cat([_document(state, model, document, share) for document in documents])


def _document(state: dict[str, Tensor], model: ModelConfig, tokens: Tensor, share: float) -> Tensor:
    """The meta tokens are simply the first rows of every document."""
    embedding, num_meta = state["model.embed_tokens.weight"], model.meta.num_tokens
    x = embedding[tokens]
    if num_meta:
        x = torch.cat([state["model.meta_tokens"], x])
    for i, kind in enumerate(parse_pattern(model.pattern, model.num_layers)):
        weights, spikes = _below(state, f"model.layers.{i}."), _Spikes(model, i, share)
        normed = _norm(x, weights["input_layernorm.weight"], model.norm_eps)
        x = x + _mixer(_below(weights, "self_attn."), model, normed, kind.mixers, spikes)
        normed = _norm(x, weights["post_attention_layernorm.weight"], model.norm_eps)
        x = x + (_experts if kind.moe else _ffn)(_below(weights, "mlp."), model, normed, spikes)
    x = _norm(x[num_meta:], state["model.norm.weight"], model.norm_eps)
    return x @ state.get("lm_head.weight", embedding).T


class _Spikes:
    """What one layer's projections read in place of their inputs."""

    def __init__(self, model: ModelConfig, layer: int, share: float):
        self.about, self.layer, self.share = model.spiking, layer, share
        self.k = model.spiking.layer_k.get(layer, model.spiking.k)

    def __call__(self, x: Tensor, projection: str) -> Tensor:
        left_out = projection == "down" and not self.about.spike_down_proj
        return x if left_out or self._skipped(projection) else self.counted(x)

    def counted(self, x: Tensor) -> Tensor:
        """Counts times the threshold of each row; gradients know nothing of it."""
        if not self.about.enabled:
            return x
        threshold = (x.abs().mean(-1, keepdim=True) / self.k).clamp(1e-5, 1e4)
        return self._partly(x, torch.round(x / threshold) * threshold)

    def in_int8(self, x: Tensor) -> Tensor:
        """Keys or values."""
        if not (self.about.enabled and self.about.kv_int8):
            return x
        scale = x.abs().amax(-1, keepdim=True) / 127
        return self._partly(x, torch.round(x / scale) * scale)

    def _partly(self, x: Tensor, replaced: Tensor) -> Tensor:
        return x + self.share * (replaced - x).detach()

    def _skipped(self, projection: str) -> bool:
        where = self.about.skip.get(projection, "")
        ranges = [part.split("-") for part in where.split(",") if part and part != "all"]
        return where == "all" or any(int(ends[0]) <= self.layer <= int(ends[-1]) for ends in ranges)


def _ffn(weights: dict[str, Tensor], model: ModelConfig, x: Tensor, spikes: _Spikes) -> Tensor:
    x = spikes(x, "gate_up")
    active = F.silu(x @ weights["gate_proj.weight"].T) * (x @ weights["up_proj.weight"].T)
    return spikes(active, "down") @ weights["down_proj.weight"].T


def _experts(weights: dict[str, Tensor], model: ModelConfig, x: Tensor, spikes: _Spikes) -> Tensor:
    """Every expert sees every token; a weight of zero leaves out those that it does not go to."""
    moe, logits = model.moe, x @ weights["router.weight"].T
    scores = logits.softmax(-1) if moe.score is RouterScore.softmax else logits.sigmoid()
    best = (scores + weights.get("router.expert_bias", 0)).argsort(-1, descending=True)[:, : moe.top_k]
    chosen = torch.zeros_like(scores).scatter(1, best, 1.0) * scores
    if moe.renormalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    out = _ffn(_below(weights, "shared_expert."), model, x, spikes) if moe.num_shared_experts else 0
    return out + sum(
        chosen[:, j, None] * _ffn(_below(weights, f"experts.{j}."), model, x, spikes) for j in range(moe.num_experts)
    )


def _mixer(
    weights: dict[str, Tensor], model: ModelConfig, x: Tensor, kinds: tuple[str, ...], spikes: _Spikes
) -> Tensor:
    if len(kinds) == 1:
        return spikes(_heads_of(weights, model, x, kinds[0], spikes), "proj") @ weights["o_proj.weight"].T
    merged = 0
    for kind in kinds:
        branch = {"L": "la_", "S": "swa_", "F": "fa_"}[kind]
        own = {**weights, **_below(weights, branch)}
        o = _heads_of(own, model, x, kind, spikes)
        if model.pair.norm_place is MergePlace.before_projection and not model.pair.shared_projections:
            o = spikes(_norm(o, own["merge_norm.weight"], model.norm_eps), "proj")
            merged = merged + o @ own["o_proj.weight"].T / 2
            continue
        if not model.pair.shared_projections:
            o = spikes(o, "proj") @ own["o_proj.weight"].T
        merged = merged + _norm(o, own["merge_norm.weight"], model.norm_eps) / 2
    return spikes(merged, "proj") @ weights["o_proj.weight"].T if model.pair.shared_projections else merged


def _heads_of(weights: dict[str, Tensor], model: ModelConfig, x: Tensor, kind: str, spikes: _Spikes) -> Tensor:
    """What the output projection reads."""
    return _gla(weights, model, x, spikes) if kind == "L" else _softmax(weights, model, x, kind, spikes)


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _heads(weights: dict[str, Tensor], name: str, x: Tensor, head_dim: int) -> Tensor:
    """x [T, D] -> [T, H, hd]."""
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias")).unflatten(-1, (-1, head_dim))


def _softmax(weights: dict[str, Tensor], model: ModelConfig, x: Tensor, kind: str, spikes: _Spikes) -> Tensor:
    x = spikes(x, "qkv")
    q, k, v = (_heads(weights, name, x, model.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
    if model.qk_norm:
        q, k = _norm(q, weights["q_norm.weight"], model.norm_eps), _norm(k, weights["k_norm.weight"], model.norm_eps)
    q, k = _rope(q, model), _rope(k, model)
    if kind == "S":
        q, k, v = spikes.counted(q) if spikes.about.queries else q, spikes.in_int8(k), spikes.in_int8(v)
    t, num_meta = torch.arange(x.shape[0]), model.meta.num_tokens
    age = t[:, None] - t[None, :]
    visible = (age >= 0) & (age < (model.window if kind == "S" else x.shape[0]))
    visible[:, :num_meta] = True
    visible[:num_meta, num_meta:] = False
    outputs = []
    for h in range(model.num_heads):
        j = h // (model.num_heads // model.num_kv_heads)
        scores = (q[:, h] @ k[:, j].T / math.sqrt(model.head_dim)).masked_fill(~visible, float("-inf"))
        outputs.append(torch.softmax(scores, -1) @ v[:, j])
    return torch.cat(outputs, -1)


def _rope(x: Tensor, model: ModelConfig) -> Tensor:
    """Rotate x [T, H, hd]: the pair (c, c + hd/2) turns by position * frequency c."""
    half = model.head_dim // 2
    frequency = torch.tensor([model.rope_theta ** (-c / half) for c in range(half)], dtype=torch.float64)
    if model.rope_scaling is not None:
        frequency = torch.tensor([_llama3(f, model.rope_scaling) for f in frequency.tolist()], dtype=torch.float64)
    position = torch.arange(x.shape[0], dtype=torch.float64)
    if model.meta.positions is MetaPositions.unrotated:
        position = (position - model.meta.num_tokens).clamp(min=0)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _llama3(frequency: float, scaling) -> float:
    """Llama 3.1: long waves are slowed by the factor, short ones stay, those between are blended."""
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _gla(weights: dict[str, Tensor], model: ModelConfig, x: Tensor, spikes: _Spikes) -> Tensor:
    gate_x, x = spikes(x, "gate"), spikes(x, "qkv")
    q, k, v = (_heads(weights, name, x, model.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
    feature_map = torch.relu if model.gla.feature_map is FeatureMap.relu else torch.sigmoid
    q, k = feature_map(q) / math.sqrt(model.head_dim), feature_map(k)
    if model.gla.gate is Gate.tied:
        decay = model.gla.lower_bound + (1 - model.gla.lower_bound) * (1 - k)
        k = 1 - decay
    else:
        if model.gla.gate is Gate.full_rank:
            gate = F.linear(gate_x, weights["gk_proj.weight"], weights["gk_proj.bias"])
        else:
            down = gate_x @ weights["gk_proj.0.weight"].T
            gate = F.linear(down, weights["gk_proj.1.weight"], weights["gk_proj.1.bias"])
        decay = torch.sigmoid(gate).pow(1 / model.gla.gate_normalizer).unflatten(-1, (-1, model.head_dim))
    if model.gla.rope:
        q, k = _rope(q, model), _rope(k, model)
    group = model.num_heads // model.num_kv_heads
    q = q.unflatten(1, (model.num_kv_heads, group))
    nothing = x.new_zeros(model.num_kv_heads, model.head_dim, model.head_dim)
    state, outputs = nothing, []
    for t in range(x.shape[0]):
        if t == model.meta.num_tokens and not model.meta.in_state:
            state = nothing
        state = decay[t][:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
        outputs.append(torch.einsum("jgk,jkv->jgv", q[t], state))
    o = _norm(torch.stack(outputs).flatten(1, 2), weights["g_norm.weight"], model.norm_eps)
    return o.flatten(1)
