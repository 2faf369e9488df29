"""The model of a folder that sbtrain has exported, or of the released SpikingBrain-7B: from config.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from sbtrain.config import typed
from sbtrain.config.mixer_rules import check_shape
from sbtrain.config.model_schema import (
    FeatureMap,
    Gate,
    GLAConfig,
    MergePlace,
    MetaConfig,
    MetaPositions,
    ModelConfig,
    MoEConfig,
    PairConfig,
    RopeScaling,
    RouterScore,
)
from sbtrain.config.moe_rules import check_moe
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.spiking_export import spiking_of

MODEL_TYPES = ("gla_swa", "sbtrain_hybrid", "sbtrain_moe")

_RELEASED = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "hidden_act": "swish",
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "gate_low_rank_dim": 16,
    "gate_logit_normalizer": 16,
    "tie_word_embeddings": False,
    "qkv_bias": True,
    "qk_norm": False,
}
"""What an absent key means: the defaults of the released configuration class."""

_NOT_IN_EXPORTS = {
    "gla": ("out_norm_init",),
    "pair": ("norm_init", "calibration_tokens"),
    "meta": ("init", "init_std"),
    "moe": ("router_init_std", "aux_loss_coeff", "exact_aux_loss", "z_loss_coeff", "capacity_factor"),
}
"""Keys of the groups that say how to start or to train a model, not what it computes."""

_OWN = ("pattern", "vocab_multiple", "max_positions", "spiking")
"""Keys that are compared in another way, or not at all: any model may be made to spike, or to do it otherwise."""


def has_int8_weights(values: dict[str, Any]) -> bool:
    """Whether the folder of a config.json has scales beside the weights of its projections."""
    return bool((values.get("spiking") or {}).get("int8_weights"))


def is_export(values: dict[str, Any]) -> bool:
    """Whether a config.json is that of an exported model."""
    return values.get("model_type") in MODEL_TYPES


def model_of_export(values: dict[str, Any], path: Path) -> ModelConfig:
    """The model that the config.json at path, read as `values`, describes. Raises ValueError, one line, naming path."""
    if not is_export(values):
        raise ValueError(f"{path}: model_type {values.get('model_type')!r} is none of {', '.join(MODEL_TYPES)}")
    try:
        model = _parallel(values) if values["model_type"] == "sbtrain_moe" else _sequential({**_RELEASED, **values})
        kinds = parse_pattern(model.pattern, model.num_layers)
        typed.build(ModelConfig, typed.plain(model), "model")
        check_shape(model)
        if any(kind.moe for kind in kinds):
            check_moe(model)
        if has_int8_weights(values) and any(kind.moe for kind in kinds):
            raise ValueError("spiking.int8_weights is true, and experts have none")
        return model
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} does not describe a model ({reason}); export the model again") from None


def contradiction(ours: ModelConfig, theirs: ModelConfig) -> str | None:
    """The first key of a recipe's model, with both values, that an exported model contradicts, or None.

    Fields that the recipe leaves at None agree with anything; what only conversion or training reads is not compared.
    """
    layers = ours.num_layers or theirs.num_layers
    if parse_pattern(ours.pattern, layers) != parse_pattern(theirs.pattern, theirs.num_layers):
        return f"model.pattern='{ours.pattern}' contradicts '{theirs.pattern}'"
    if theirs.spiking.enabled and not ours.spiking.enabled:
        return "model.spiking.enabled=false contradicts true"
    kinds = parse_pattern(theirs.pattern, theirs.num_layers)
    unused = {
        "gla": all("L" not in kind.mixers for kind in kinds),
        "pair": all(len(kind.mixers) == 1 for kind in kinds),
        "moe": not any(kind.moe for kind in kinds),
        "window": all("S" not in kind.mixers for kind in kinds),
        "meta": ours.meta.num_tokens == theirs.meta.num_tokens == 0,
    }
    for key, mine, exported in _differences(_alike(ours, theirs), theirs):
        group = key.split(".")[0]
        if not unused.get(group) and key.split(".")[-1] not in _NOT_IN_EXPORTS.get(group, ()):
            return f"model.{key}={_text(mine)} contradicts {_text(exported)}"
    return None


def _alike(ours: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """Ours, with theirs where another value is written or has no effect beside the other keys, or only trains."""
    gla, moe, pair = ours.gla, ours.moe, ours.pair
    if pair.shared_projections:
        pair = replace(pair, norm_place=theirs.pair.norm_place)
    if gla.gate is Gate.tied:
        gla = replace(gla, gate_normalizer=theirs.gla.gate_normalizer)
    if gla.gate is not Gate.low_rank:
        gla = replace(gla, gate_rank=theirs.gla.gate_rank)
    if (moe.expert_ffn_size or theirs.ffn_size) == (theirs.moe.expert_ffn_size or theirs.ffn_size):
        moe = replace(moe, expert_ffn_size=theirs.moe.expert_ffn_size)
    if moe.bias_update_rate > 0 and theirs.moe.bias_update_rate > 0:
        moe = replace(moe, bias_update_rate=theirs.moe.bias_update_rate)
    return replace(ours, gla=gla, moe=moe, pair=pair)


def _differences(ours, theirs, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for field in fields(ours):
        key, mine, exported = field.name, getattr(ours, field.name), getattr(theirs, field.name)
        if key in _OWN or mine == exported or mine is None:
            continue
        if is_dataclass(mine) and is_dataclass(exported) and key != "rope_scaling":
            yield from _differences(mine, exported, f"{key}.")
        else:
            yield prefix + key, mine, exported


def _text(value) -> Any:
    return getattr(value, "name", value)


def _scaling(values: dict[str, Any]) -> RopeScaling | None:
    return RopeScaling(**values["llama3_rope"]) if values.get("llama3_rope") else None


def _sequential(values: dict[str, Any]) -> ModelConfig:
    """gla_swa and sbtrain_hybrid: one mixer a layer, dense FFNs; sliding_window leaves out the query's own key."""
    if values.get("use_short_conv"):
        raise ValueError("use_short_conv is not supported; the released models have it off")
    if values["hidden_act"] not in ("swish", "silu"):
        raise ValueError(f"hidden_act {values['hidden_act']!r} is not supported; use swish")
    layers, heads = values["num_hidden_layers"], values["num_attention_heads"]
    windows = values.get("attn_layers")
    windows = range(1, layers, 2) if windows is None else windows
    kinds = values.get("layer_kinds") or "".join("S" if layer in windows else "L" for layer in range(layers))
    return ModelConfig(
        pattern="".join(kinds[layer] for layer in range(layers)),
        num_kv_heads=heads if values["num_key_value_heads"] is None else values["num_key_value_heads"],
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        norm_eps=float(values["norm_eps"]),
        window=values["sliding_window"] + 1,
        gla=GLAConfig(
            gate=Gate.full_rank if values.get("gate_full_rank") else Gate.low_rank,
            gate_rank=values["gate_low_rank_dim"],
            gate_normalizer=float(values["gate_logit_normalizer"]),
        ),
        **_shape(values),
    )


def _parallel(values: dict[str, Any]) -> ModelConfig:
    """sbtrain_moe: pairs, meta tokens, experts; sliding_window counts the query's own key."""
    return ModelConfig(
        pattern="".join(values["layer_kinds"]),
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        norm_eps=float(values["rms_norm_eps"]),
        window=values["sliding_window"],
        gla=GLAConfig(
            feature_map=FeatureMap(values["linear_feature_map"]),
            gate=Gate(values["linear_gate"]),
            lower_bound=float(values["linear_gate_lower_bound"]),
            rope=values.get("linear_rope", False),
            gate_rank=values["gate_low_rank_dim"],
            gate_normalizer=float(values["gate_logit_normalizer"]),
        ),
        pair=PairConfig(shared_projections=values["shared_projections"], norm_place=_norm_place(values)),
        meta=MetaConfig(
            num_tokens=values["num_meta_tokens"],
            positions=MetaPositions(values["meta_positions"]),
            in_state=values["meta_in_state"],
        ),
        moe=MoEConfig(
            num_experts=values["num_experts"],
            top_k=values["num_experts_per_tok"],
            num_shared_experts=values["num_shared_experts"],
            expert_ffn_size=_expert_size(values),
            score=RouterScore(values["router_score"]),
            renormalize=values["norm_topk_prob"],
            bias_update_rate=values["router_bias_update_rate"],
        ),
        **_shape(values),
    )


def _norm_place(values: dict[str, Any]) -> MergePlace:
    before = values.get("merge_norm_before_projection", False) and not values["shared_projections"]
    return MergePlace.before_projection if before else MergePlace.behind_projection


def _expert_size(values: dict[str, Any]) -> int | None:
    width = values["moe_intermediate_size"]
    return None if width == values["intermediate_size"] else width


def _shape(values: dict[str, Any]) -> dict[str, Any]:
    """What both kinds of config.json call the same."""
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "ffn_size": values["intermediate_size"],
        "rope_theta": float(values["rope_theta"]),
        "rope_scaling": _scaling(values),
        "max_positions": values["max_position_embeddings"],
        "tie_embeddings": values["tie_word_embeddings"],
        "qkv_bias": values["qkv_bias"],
        "qk_norm": values["qk_norm"],
        "spiking": spiking_of(values),
    }
