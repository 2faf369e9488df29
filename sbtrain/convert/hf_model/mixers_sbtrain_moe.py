"""Pairs of mixers over meta tokens, and mixtures of experts, in plain torch.

Letters in shapes: B batch, T new tokens, M meta tokens, H query heads, J key/value heads, K head size, D hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .mixers_gla_swa import HybridCache, RMSNorm, gate, gated_linear_attention, rotate, windowed_attention
from .spiking_gla_swa import linear, replace_heads

BRANCH = {"L": "la_", "S": "swa_", "F": "fa_"}


class SinkCache(HybridCache):
    """A HybridCache whose `states` are by layer and mixer, and what the meta tokens left behind in each.

    `sinks`, the same for every row: keys and values [J, M, K] of S and F, the first state [1, J, K, K] of L.
    """

    def __init__(self):
        super().__init__()
        self.sinks = {}


class TokenMixer(nn.Module):
    """The mixers of one layer: one, or two on the same input, whose normed outputs are averaged."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.symbols = config, layer, config.mixers(layer)
        self.shared = len(self.symbols) > 1 and config.shared_projections
        self.norm_first = config.shared_projections or config.merge_norm_before_projection
        hidden, head_dim, bias = config.hidden_size, config.head_dim, config.qkv_bias
        sizes = {"q": config.num_attention_heads * head_dim, "k": config.num_key_value_heads * head_dim}
        sizes["v"] = sizes["k"]
        for symbol in self.symbols:
            prefix = self.prefix(symbol)
            if not hasattr(self, f"{prefix}q_proj"):
                for name, size in sizes.items():
                    setattr(self, f"{prefix}{name}_proj", linear(config, layer, "qkv", hidden, size, bias))
                setattr(self, f"{prefix}o_proj", linear(config, layer, "proj", sizes["q"], hidden))
            self._add_own(symbol)
            if len(self.symbols) > 1:
                norm = RMSNorm(sizes["q"] if self.norm_first else hidden, config.rms_norm_eps)
                setattr(self, f"{BRANCH[symbol]}merge_norm", norm)

    def prefix(self, symbol):
        """What a mixer's projections begin with."""
        return BRANCH[symbol] if len(self.symbols) > 1 and not self.shared else ""

    def _add_own(self, symbol):
        config = self.config
        if symbol == "L":
            self.g_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            if config.linear_gate != "tied":
                self.gk_proj = gate(config, self.layer, config.linear_gate == "full_rank")
        elif config.qk_norm:
            prefix = BRANCH[symbol] if len(self.symbols) > 1 else ""
            for name in "qk":
                setattr(self, f"{prefix}{name}_norm", RMSNorm(config.head_dim, config.rms_norm_eps))

    def forward(self, x, rope, valid, cache, meta):
        """x [B, T, D] -> [B, T, D]. rope: cos and sin [B, T, K/2]; valid [B, S] bool, False at padding.

        cache: a SinkCache, read and extended. meta: x are the meta tokens, B = 1, and the cache keeps what they leave.
        """
        outputs = []
        for symbol in self.symbols:
            prefix = self.prefix(symbol)
            projections = (getattr(self, f"{prefix}{name}_proj") for name in "qkv")
            q, k, v = (projection(x).unflatten(-1, (-1, self.config.head_dim)) for projection in projections)
            core = self._linear if symbol == "L" else self._softmax
            o = core(symbol, x, q, k, v, rope, valid, cache, meta)
            norm = getattr(self, f"{BRANCH[symbol]}merge_norm", nn.Identity())
            o = norm(o) if self.norm_first else o
            o = o if self.shared else getattr(self, f"{prefix}o_proj")(o)
            outputs.append(o if self.norm_first else norm(o))
        merged = outputs[0] if len(outputs) == 1 else 0.5 * (outputs[0] + outputs[1])
        return self.o_proj(merged) if self.shared else merged

    def _linear(self, symbol, x, q, k, v, rope, valid, cache, meta):
        """Gated linear attention -> [B, T, H K]. Padding leaves the state as it is."""
        key, config = (self.layer, symbol), self.config
        q, k, log_decay = self._features(x, q.float(), k.float())
        if config.linear_rope:
            q, k = rotate(q, rope), rotate(k, rope)
        padding = ~valid[:, -x.shape[1] :, None, None]
        v, log_decay = v.float().masked_fill(padding, 0.0), log_decay.masked_fill(padding, 0.0)
        if meta:
            state = None
        else:
            (state,) = cache.states.get(key, cache.sinks.get(key, (None,)))
            state = state if state is None else state.expand(x.shape[0], -1, -1, -1)
        q = q.unflatten(2, (config.num_key_value_heads, -1)) / math.sqrt(config.head_dim)
        o, state = gated_linear_attention(q, k, v, log_decay, state)
        if not meta:
            cache.states[key] = (state,)
        elif config.meta_in_state:
            cache.sinks[key] = (state,)
        return self.g_norm(o, x.dtype).flatten(2)

    def _features(self, x, q, k):
        """Queries, keys and log decays, fp32, from what the projections give."""
        activation = torch.sigmoid if self.config.linear_feature_map == "sigmoid" else F.relu
        if self.config.linear_gate != "tied":
            logits = self.gk_proj(x).float().unflatten(-1, (-1, self.config.head_dim))
            return activation(q), activation(k), F.logsigmoid(logits) / self.config.gate_logit_normalizer
        bound = self.config.linear_gate_lower_bound
        if bound == 0:
            return activation(q), activation(k), -F.softplus(k)
        return activation(q), (1 - bound) * activation(k), (bound + (1 - bound) * torch.sigmoid(-k)).log()

    def _softmax(self, symbol, x, q, k, v, rope, valid, cache, meta):
        """Attention with RoPE -> [B, T, H K]: over the meta tokens, and those of the text before and in the window."""
        key, prefix = (self.layer, symbol), BRANCH[symbol] if len(self.symbols) > 1 else ""
        if self.config.qk_norm:
            q, k = getattr(self, f"{prefix}q_norm")(q), getattr(self, f"{prefix}k_norm")(k)
        q, k, v = rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)
        if symbol == "S":
            q, k, v = replace_heads(self.config, self.layer, q, k, v)
        if meta:
            cache.sinks[key] = (k[0], v[0])
            group = q.shape[1] // k.shape[1]
            o = F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
            return o.transpose(1, 2).flatten(2)
        if key in cache.states:
            old_k, old_v = cache.states[key]
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        window = self.config.sliding_window if symbol == "S" else None
        cut = 0 if window is None else max(0, k.shape[2] - (window - 1))
        cache.states[key] = (k[:, :, cut:].clone(), v[:, :, cut:].clone()) if cut else (k, v)
        o = windowed_attention(q, k, v, valid[:, -k.shape[2] :], window, cache.sinks.get(key))
        return o.transpose(1, 2).flatten(2)


class Router(nn.Linear):
    """Scores of the experts before softmax or sigmoid. expert_bias: added where experts are chosen; fp32 always."""

    def __init__(self, inputs, num_experts, *, biased):
        super().__init__(inputs, num_experts, bias=False)
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32) if biased else None)

    def _apply(self, fn, recurse=True):
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None:  # rounded, it would choose others
            fresh = before.is_meta or self.expert_bias.is_meta
            self.expert_bias = self.expert_bias.float() if fresh else before.to(self.expert_bias.device)
        return self


class MixtureOfExperts(nn.Module):
    """Every token goes to its top experts, weighted by the router, and to the shared ones, side by side in one FFN."""

    def __init__(self, config, ffn):
        """ffn: makes a gated FFN of a width."""
        super().__init__()
        self.top_k, self.score, self.renormalize = (
            config.num_experts_per_tok,
            config.router_score,
            config.norm_topk_prob,
        )
        self.router = Router(config.hidden_size, config.num_experts, biased=bool(config.router_bias_update_rate))
        self.experts = nn.ModuleList([ffn(config.moe_intermediate_size) for _ in range(config.num_experts)])
        width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_expert = ffn(width) if width else None

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]. Scores are fp32; no token is dropped."""
        tokens = x.flatten(0, -2)
        logits = F.linear(tokens.float(), self.router.weight.float())
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        bias = self.router.expert_bias
        chosen = (scores if bias is None else scores + bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens) if self.shared_expert is None else self.shared_expert(tokens)
        for j in chosen.unique().tolist():
            row, place = (chosen == j).nonzero(as_tuple=True)
            out = out.index_add(0, row, self.experts[j](tokens[row]) * weights[row, place, None].to(x.dtype))
        return out.view_as(x)
