"""Configuration of the hybrid with pairs of mixers, meta tokens and mixtures of experts (SpikingBrain-76B)."""

from transformers.configuration_utils import PretrainedConfig

DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 18944,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "llama3_rope": None,
    "qkv_bias": True,
    "qk_norm": False,
    "layer_kinds": None,
    "sliding_window": 4096,
    "linear_feature_map": "sigmoid",
    "linear_gate": "tied",
    "linear_gate_lower_bound": 0.0,
    "linear_rope": False,
    "gate_low_rank_dim": 16,
    "gate_logit_normalizer": 16,
    "shared_projections": False,
    "merge_norm_before_projection": False,
    "num_meta_tokens": 0,
    "meta_positions": "prepended",
    "meta_in_state": True,
    "num_experts": 16,
    "num_experts_per_tok": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": None,
    "router_score": "softmax",
    "norm_topk_prob": False,
    "router_bias_update_rate": 0.0,
    "spiking": None,
    "use_cache": True,
    "initializer_range": 0.02,
}
"""The keys that are this model's, and what an absent one means."""


class SbtrainMoeConfig(PretrainedConfig):
    """One string a layer says what it is: its mixers, two in parentheses, and `:m` for a mixture of experts.

    layer_kinds: such as "(LS):m"; L gated linear attention, S sliding window, F full attention.
    sliding_window: keys that a query of S sees, its own included; meta tokens besides.
    linear_feature_map: relu or sigmoid, of L's queries and keys. linear_gate: low_rank (gate_low_rank_dim,
        gate_logit_normalizer), full_rank or tied, decay = lb + (1 - lb)(1 - key), lb linear_gate_lower_bound.
        linear_rope: RoPE behind the feature map.
    shared_projections: the two mixers of a pair share q, k, v and output projections. merge_norm_before_projection: the
        norms of a pair's mixers come before output projections of their own, as they do before a shared one.
    num_meta_tokens: learned tokens before every text. meta_positions: prepended (texts begin behind them) or unrotated.
        meta_in_state: L's state begins with them.
    num_experts, num_experts_per_tok, num_shared_experts, moe_intermediate_size: of `:m` layers. router_score: softmax
        or sigmoid. norm_topk_prob: a token's weights add up to 1. router_bias_update_rate: not 0: choices see a bias.
    llama3_rope: None, or {factor, low_freq_factor, high_freq_factor, original_max_positions}.
    spiking: activations as spikes, perhaps on INT8 weights; see spiking_gla_swa.
    """

    model_type = "sbtrain_moe"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **kwargs):
        for key, default in DEFAULTS.items():
            setattr(self, key, kwargs.pop(key, default))
        if self.hidden_act not in ("swish", "silu"):
            raise ValueError(f"config.json: hidden_act {self.hidden_act!r} is not supported; use silu")
        self.layer_kinds = list(self.layer_kinds or ["(LS)"] * self.num_hidden_layers)
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        super().__init__(**kwargs)

    def mixers(self, layer):
        """Letters of a layer's mixers, one or two."""
        return self.layer_kinds[layer].removesuffix(":m").strip("()")

    def is_moe(self, layer):
        """Whether a layer's FFN is a mixture of experts."""
        return self.layer_kinds[layer].endswith(":m")
