"""The export formats: which of them can hold a model, and the config.json of each.

gla_swa      that of the released SpikingBrain-7B, so its modeling code loads the folder as well as ours does
sbtrain      the same with what that code cannot express: full attention, q/k norms, other heads, ties, scaled RoPE
sbtrain_moe  pairs of mixers, meta tokens, mixtures of experts, sigmoid features and tied gates (SpikingBrain-76B, for
             which no format was released)
w8aspike     one of the three with INT8 weights and activations as spikes; gla_swa then is the format of the released
             SpikingBrain-7B-W8ASpike, and the gate of linear attention is one matrix
"""

from __future__ import annotations

from typing import Any

from sbtrain.config.model_schema import FeatureMap, Gate, ModelConfig, RopeScaling
from sbtrain.config.spiking_export import alike, described
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.convert.shards import DTYPES
from sbtrain.convert.weights import kinds_of

MODEL_TYPES = {"gla_swa": "gla_swa", "sbtrain": "sbtrain_hybrid", "sbtrain_moe": "sbtrain_moe"}
"""Format -> model_type of its config.json."""
W8ASPIKE = "w8aspike"
FORMATS = ("hf", *MODEL_TYPES, W8ASPIKE)
_FILES = {"gla_swa": "gla_swa", "sbtrain": "gla_swa", "sbtrain_moe": "sbtrain_moe"}
_CLASSES = {"gla_swa": "GLAswa", "sbtrain": "SbtrainHybrid", "sbtrain_moe": "SbtrainMoe"}
_RELEASED_GATE = (16, 16.0)
_RELEASED_SPIKING = SpikingConfig(enabled=True)


def choose_format(format: str, model: ModelConfig) -> str:
    """The one of MODEL_TYPES to write for a format of FORMATS. Raises ValueError where that cannot hold the model.

    model: for w8aspike, with the gate and the spikes that its INT8 weights have (see sbtrain.convert.calibrated).
    """
    if format not in FORMATS:
        raise ValueError(f"format={format} is not known; choose one of {', '.join(FORMATS)}")
    int8 = format == W8ASPIKE
    parallel, released = sbtrain_refusal(model), gla_swa_refusal(model, int8_weights=int8)
    if format == "gla_swa" and released:
        raise ValueError(f"format=gla_swa: the released code cannot hold this model, {released}; use format=hf")
    if format == "sbtrain" and parallel:
        raise ValueError(f"format=sbtrain cannot hold this model, {parallel}; use format=hf")
    if format in ("hf", W8ASPIKE):
        return "sbtrain_moe" if parallel else "sbtrain" if released else "gla_swa"
    return format


def sbtrain_refusal(model: ModelConfig) -> str | None:
    """Why only sbtrain_moe can hold this model; None if another format can."""
    kinds, gla = kinds_of(model), model.gla
    reasons = [
        (any(len(kind.mixers) > 1 for kind in kinds), "it has one mixer a layer"),
        (any(kind.moe for kind in kinds), "its FFNs are dense"),
        (model.meta.num_tokens > 0, "it has no meta tokens"),
        (
            any("L" in kind.mixers for kind in kinds)
            and (gla.feature_map is not FeatureMap.relu or gla.gate is Gate.tied or gla.rope),
            "its linear attention has ReLU features, a gate of its own and no RoPE",
        ),
    ]
    return next((reason for refused, reason in reasons if refused), None)


def gla_swa_refusal(model: ModelConfig, *, int8_weights: bool = False) -> str | None:
    """Why the released SpikingBrain-7B modeling code, float or INT8, cannot hold this model; None if it can."""
    if sbtrain_refusal(model):
        return sbtrain_refusal(model)
    symbols, gate = _symbols(model), (model.gla.gate_rank, model.gla.gate_normalizer)
    if int8_weights:
        spiking = alike(model.spiking, _RELEASED_SPIKING, model.num_layers)
        about_gate = (gate[1] != _RELEASED_GATE[1], "its gate has normalizer 16")
        about_spikes = (spiking != _RELEASED_SPIKING, "its spikes are those of model.spiking's defaults")
    else:
        low_rank = model.gla.gate is Gate.low_rank
        about_gate = (not low_rank or gate != _RELEASED_GATE, "its gate has rank 16 and normalizer 16")
        about_spikes = (model.spiking.enabled, "its activations are no spikes")
    reasons = [
        about_spikes,
        (model.qk_norm, "its attention has no q/k norms"),
        ("F" in symbols, "it has no full-attention layers"),
        (model.num_heads * model.head_dim != model.hidden_size, "its head_dim is hidden_size / num_heads"),
        (model.rope_scaling is not None, "its RoPE has no scaling"),
        ("L" in symbols and about_gate[0], about_gate[1]),
    ]
    return next((reason for refused, reason in reasons if refused), None)


def config_of(model: ModelConfig, *, form: str, dtype: str, int8_weights: bool = False) -> dict[str, Any]:
    """config.json of a model in one of MODEL_TYPES; special token ids are None."""
    files, name = _FILES[form], _CLASSES[form]
    common = {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{files}.{name}Config",
            "AutoModelForCausalLM": f"modeling_{files}.{name}ForCausalLM",
        },
        "model_type": MODEL_TYPES[form],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "gate_logit_normalizer": model.gla.gate_normalizer,
        "gate_low_rank_dim": model.gla.gate_rank,
        "hidden_size": model.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": model.max_positions,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "pad_token_id": None,
        "rope_theta": model.rope_theta,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
    own = {"gla_swa": _released, "sbtrain": _hybrid, "sbtrain_moe": _parallel}[form]
    return {**common, **own(model), **_spiking(model, int8_weights=int8_weights)}


def modeling_files(form: str) -> list[str]:
    """Files of hf_model that transformers needs for a format; the last format's are built on those of the others."""
    families = sorted({"gla_swa", _FILES[form]})
    files = [f"{part}_{family}.py" for family in families for part in ("configuration", "mixers", "modeling")]
    return [*files, "spiking_gla_swa.py"]


def _spiking(model: ModelConfig, *, int8_weights: bool) -> dict[str, Any]:
    if not model.spiking.enabled:
        return {}
    spiking = described(model.spiking, num_layers=model.num_layers, int8_weights=int8_weights)
    # the released configuration has a key of its own, which its code does not read
    return {"spiking": spiking, **({"quant_weight_group_size": model.spiking.weight_group} if int8_weights else {})}


def _released(model: ModelConfig) -> dict[str, Any]:
    return {
        "attn_layers": [layer for layer, symbol in enumerate(_symbols(model)) if symbol == "S"],
        "attn_mode": "chunk",
        "conv_size": 4,
        **({"gate_full_rank": True} if model.gla.gate is Gate.full_rank else {}),
        "elementwise_affine": True,
        "fuse_cross_entropy": True,
        "hidden_act": "swish",
        "norm_eps": model.norm_eps,
        "sliding_window": model.window - 1,
        "tie_word_embeddings": False,
        "use_short_conv": False,
    }


def _hybrid(model: ModelConfig) -> dict[str, Any]:
    return {**_released(model), "layer_kinds": _symbols(model), **_shape(model)}


def _parallel(model: ModelConfig) -> dict[str, Any]:
    gla, moe = model.gla, model.moe
    return {
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "layer_kinds": [kind.symbol for kind in kinds_of(model)],
        "sliding_window": model.window,
        "linear_feature_map": gla.feature_map.value,
        "linear_gate": gla.gate.value,
        "linear_gate_lower_bound": gla.lower_bound,
        "linear_rope": gla.rope,
        "shared_projections": model.pair.shared_projections,
        "merge_norm_before_projection": model.pair.norms_before_projection,
        "num_meta_tokens": model.meta.num_tokens,
        "meta_positions": model.meta.positions.value,
        "meta_in_state": model.meta.in_state,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "num_shared_experts": moe.num_shared_experts,
        "moe_intermediate_size": moe.expert_ffn_size or model.ffn_size,
        "router_score": moe.score.value,
        "norm_topk_prob": moe.renormalize,
        "router_bias_update_rate": moe.bias_update_rate,
        **_shape(model),
    }


def _shape(model: ModelConfig) -> dict[str, Any]:
    return {
        "head_dim": model.head_dim,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "tie_word_embeddings": model.tie_embeddings,
        "llama3_rope": _llama3(model.rope_scaling),
    }


def _llama3(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_positions": scaling.original_max_positions,
    }


def _symbols(model: ModelConfig) -> str:
    """The mixer of every layer, of a model with one a layer."""
    return "".join(kind.mixers[0] for kind in kinds_of(model))
