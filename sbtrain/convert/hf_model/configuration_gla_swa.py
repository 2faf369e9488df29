"""Configuration of the hybrid of gated linear attention, sliding windows and full attention.

GLAswaConfig has the fields of the released SpikingBrain-7B. SbtrainHybridConfig adds what other source models need.
"""

from transformers.configuration_utils import PretrainedConfig


class GLAswaConfig(PretrainedConfig):
    """SpikingBrain-7B: attn_layers slide a window, all other layers are gated linear attention.

    sliding_window: keys a query sees before its own, so sliding_window + 1 in all.
    layer_kinds: one letter a layer, L gated linear attention, S sliding window, F full; wins over attn_layers.
    head_dim: None means hidden_size / num_attention_heads.
    llama3_rope: None, or {factor, low_freq_factor, high_freq_factor, original_max_positions}.
    gate_full_rank: linear attention's gate is one matrix, not two of rank gate_low_rank_dim.
    spiking: activations as spikes, perhaps on INT8 weights; see spiking_gla_swa.
    """

    model_type = "gla_swa"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=152064,
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        hidden_act="swish",
        max_position_embeddings=131072,
        sliding_window=4096,
        attn_layers=None,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        gate_low_rank_dim=16,
        gate_logit_normalizer=16,
        use_cache=True,
        initializer_range=0.02,
        pad_token_id=None,
        bos_token_id=151643,
        eos_token_id=151643,
        tie_word_embeddings=False,
        layer_kinds=None,
        head_dim=None,
        qkv_bias=True,
        qk_norm=False,
        llama3_rope=None,
        **kwargs,
    ):
        if kwargs.get("use_short_conv"):
            raise ValueError("config.json: use_short_conv is not supported; the released models have it off")
        if hidden_act not in ("swish", "silu"):
            raise ValueError(f"config.json: hidden_act {hidden_act!r} is not supported; use swish")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads if num_key_value_heads is not None else num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.sliding_window = sliding_window
        self.attn_layers = list(range(1, num_hidden_layers, 2)) if attn_layers is None else list(attn_layers)
        self.norm_eps, self.rope_theta = norm_eps, rope_theta
        self.gate_low_rank_dim = gate_low_rank_dim
        self.gate_logit_normalizer = gate_logit_normalizer
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        self.layer_kinds = layer_kinds
        self.head_dim = head_dim if head_dim is not None else hidden_size // num_attention_heads
        self.qkv_bias, self.qk_norm = qkv_bias, qk_norm
        self.llama3_rope = llama3_rope
        self.gate_full_rank, self.spiking = kwargs.pop("gate_full_rank", False), kwargs.pop("spiking", None)
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def kind(self, layer):
        """L, S or F."""
        if self.layer_kinds is not None:
            return self.layer_kinds[layer]
        return "S" if layer in self.attn_layers else "L"


class SbtrainHybridConfig(GLAswaConfig):
    """The same model where the source has other heads, q/k norms, no biases, tied embeddings or scaled RoPE."""

    model_type = "sbtrain_hybrid"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # without an __init__ of its own transformers 5 would make it a dataclass
