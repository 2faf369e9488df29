"""The two mixers and their cache, in plain torch: gated linear attention, and softmax attention with a window.

Letters in shapes: B batch, T new tokens, S keys, H query heads, J key/value heads, G = H / J, K head size.
Query head h reads key/value head h // G; nothing is repeated that need not be.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .spiking_gla_swa import linear, replace_heads

CHUNK = 32
QUERY_BLOCK = 1024


class HybridCache:
    """What decoding needs of the past, by layer. The size is constant but for full-attention layers.

    L layers keep a state [B, J, K, K] in fp32; S layers the last sliding_window keys and values [B, J, S, K] after
    RoPE, F layers all of them. `mask` [B, seen tokens] is 0 at padding.
    """

    is_compileable = False

    def __init__(self):
        self.states = {}
        self.mask = None

    def get_seq_length(self, layer_idx=0):
        """Tokens seen so far, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def get_max_cache_shape(self, layer_idx=0):
        """No limit."""
        return -1

    def reorder_cache(self, beam_idx):
        """Follow a beam search: row b becomes what row beam_idx[b] was."""
        self.mask = self.mask.index_select(0, beam_idx)
        for layer, state in self.states.items():
            self.states[layer] = tuple(tensor.index_select(0, beam_idx) for tensor in state)

    def batch_repeat_interleave(self, repeats):
        """Repeat every row."""
        self.mask = self.mask.repeat_interleave(repeats, 0)
        for layer, state in self.states.items():
            self.states[layer] = tuple(tensor.repeat_interleave(repeats, 0) for tensor in state)


class RMSNorm(nn.Module):
    """w * x / rms(x), in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, dtype=None):
        """x [..., size] -> the same shape, in dtype or that of x."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * wide).to(dtype or x.dtype)


def gated_linear_attention(q, k, v, log_decay, state=None):
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t, o_t = q_t S_t, exact, by chunks; all fp32.

    q [B, T, J, G, K], already scaled; k, v, log_decay [B, T, J, K]; state [B, J, K, K] or None for zeros.
    Returns o [B, T, J, G, K] and the last state. Decays are only formed from differences of cumulative logs that are
    not positive, so nothing overflows.
    """
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])
    if k.shape[1] == 1:
        state = log_decay[:, 0].exp()[..., None] * state + k[:, 0][..., None] * v[:, 0][..., None, :]
        return torch.einsum("btjgk,bjkv->btjgv", q, state), state
    outputs = []
    for start in range(0, k.shape[1], CHUNK):
        qc, kc, vc, decay = (x[:, start : start + CHUNK] for x in (q, k, v, log_decay))
        total = decay.cumsum(1)
        between = total[:, :, None] - total[:, None]  # [B, C, C, J, K], query by key
        future = torch.ones(between.shape[1:3], dtype=torch.bool, device=k.device).triu(1)
        keys = between.masked_fill(future[None, :, :, None, None], float("-inf")).exp() * kc[:, None]
        scores = torch.einsum("bijgk,bisjk->bijgs", qc, keys)
        inside = torch.einsum("bijgs,bsjv->bijgv", scores, vc)
        outputs.append(inside + torch.einsum("bijgk,bjkv->bijgv", qc * total.exp()[:, :, :, None], state))
        to_end = (total[:, -1:] - total).exp() * kc
        state = total[:, -1].exp()[..., None] * state + torch.einsum("bsjk,bsjv->bjkv", to_end, vc)
    return torch.cat(outputs, 1), state


def windowed_attention(q, k, v, valid, window, sinks=None):
    """Causal softmax attention of the last T positions of S.

    q [B, H, T, K]; k, v [B, J, S, K]; valid [B, S] bool, False at padding; window: visible keys, the query's own
    included, or None. sinks: keys and values [J, M, K] that every query sees besides, or None. Blocks of queries, so a
    window costs T * window and not T * T. Returns [B, H, T, K].
    """
    group, past = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    sinks = [] if sinks is None else [x.repeat_interleave(group, 0).expand(len(q), -1, -1, -1) for x in sinks]
    outputs = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = q[:, :, start : start + QUERY_BLOCK]
        stop = past + start + block.shape[2]
        first = 0 if window is None else max(0, past + start - window + 1)
        age = torch.arange(past + start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        visible = (age >= 0) & valid[:, None, None, first:stop]
        if window is not None:
            visible = visible & (age < window)
        visible = visible | (age == 0)  # a padded query sees itself, or its softmax would be 0 / 0
        keys, values = k[:, :, first:stop], v[:, :, first:stop]
        if sinks:
            keys, values = torch.cat([sinks[0], keys], 2), torch.cat([sinks[1], values], 2)
            visible = F.pad(visible, (keys.shape[2] - visible.shape[-1], 0), value=True)
        outputs.append(F.scaled_dot_product_attention(block, keys, values, visible))
    return torch.cat(outputs, 2)


class Mixer(nn.Module):
    """Projections that both mixers have."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden, kv_size, bias = config.hidden_size, self.kv_heads * self.head_dim, config.qkv_bias
        self.q_proj = linear(config, layer, "qkv", hidden, self.heads * self.head_dim, bias)
        self.k_proj = linear(config, layer, "qkv", hidden, kv_size, bias)
        self.v_proj = linear(config, layer, "qkv", hidden, kv_size, bias)
        self.o_proj = linear(config, layer, "proj", self.heads * self.head_dim, hidden)

    def heads_of(self, projection, x):
        """x [B, T, D] -> [B, T, heads, K]."""
        return projection(x).unflatten(-1, (-1, self.head_dim))


def gate(config, layer, full_rank):
    """The projection to logits of decays: one matrix, or two around a bottleneck, of which the first one spikes."""
    outputs = config.num_key_value_heads * config.head_dim
    if full_rank:
        return linear(config, layer, "gate", config.hidden_size, outputs, bias=True)
    down = linear(config, layer, "gate", config.hidden_size, config.gate_low_rank_dim)
    return nn.Sequential(down, nn.Linear(config.gate_low_rank_dim, outputs))


class GatedLinearAttention(Mixer):
    """ReLU features of q and k, a decay per key channel from a gate, a norm per head; no RoPE, no q/k norm."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gk_proj = gate(config, layer, config.gate_full_rank)
        self.g_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.gate_logit_normalizer = config.gate_logit_normalizer

    def forward(self, x, rope, valid, cache):
        """x [B, T, D] -> [B, T, D]. valid [B, S]: padding writes nothing into the state. rope is not used."""
        q = F.relu(self.heads_of(self.q_proj, x)).float().unflatten(2, (self.kv_heads, -1))
        k = F.relu(self.heads_of(self.k_proj, x)).float()
        v = self.heads_of(self.v_proj, x).float().masked_fill(~valid[:, -x.shape[1] :, None, None], 0.0)
        log_decay = F.logsigmoid(self.heads_of(self.gk_proj, x).float()) / self.gate_logit_normalizer
        (state,) = cache.states.get(self.layer, (None,)) if cache is not None else (None,)
        o, state = gated_linear_attention(q / math.sqrt(self.head_dim), k, v, log_decay, state)
        if cache is not None:
            cache.states[self.layer] = (state,)
        return self.o_proj(self.g_norm(o, x.dtype).flatten(2))


class SoftmaxAttention(Mixer):
    """Grouped-query attention with RoPE, over a window or everything; q/k norms, if the model has them, before RoPE."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.window = config.sliding_window + 1 if config.kind(layer) == "S" else None
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x, rope, valid, cache):
        """x [B, T, D] -> [B, T, D]. rope: cos and sin [B, T, K/2]; valid [B, S] bool, False at padding."""
        q, k, v = (self.heads_of(proj, x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)
        if self.window is not None:
            q, k, v = replace_heads(self.config, self.layer, q, k, v)
        if cache is not None:
            if self.layer in cache.states:
                old_k, old_v = cache.states[self.layer]
                k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
            keep = k.shape[2] if self.window is None else min(k.shape[2], self.window - 1)
            cut = k.shape[2] - keep
            cache.states[self.layer] = (k[:, :, cut:].clone(), v[:, :, cut:].clone()) if cut else (k, v)
        o = windowed_attention(q, k, v, valid[:, -k.shape[2] :], self.window)
        return self.o_proj(o.transpose(1, 2).flatten(2))


def rotary_table(config, positions):
    """positions [B, T] -> cos and sin [B, T, K/2], fp32."""
    half = config.head_dim // 2
    step = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    frequency = 1.0 / config.rope_theta**step
    if config.llama3_rope:
        scaling = config.llama3_rope
        turns = scaling["original_max_positions"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling["factor"])
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """RoPE of x [B, T, H, K]: entry c turns with entry c + K/2."""
    cos, sin = (table[:, :, None].to(x.dtype) for table in rope)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
