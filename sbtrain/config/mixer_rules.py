"""Rules of a model's sizes, of what mixers are made of, and of how rows of tokens, meta tokens among them, are cut."""

from __future__ import annotations

from dataclasses import replace

from parallel.layout import Layout
from sbtrain.config.model_schema import FeatureMap, Gate, ModelConfig


def check_shape(model: ModelConfig) -> None:
    """Sizes are positive, and query heads share key/value heads evenly."""
    for field in (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "ffn_size",
        "max_positions",
        "vocab_multiple",
        "window",
        "norm_eps",
        "rope_theta",
    ):
        if getattr(model, field) <= 0:
            raise ValueError(f"model.{field}={getattr(model, field)} must be greater than 0")
    if model.num_heads % model.num_kv_heads:
        raise ValueError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; "
            "choose a divisor"
        )
    if model.head_dim % 2:
        raise ValueError(f"model.head_dim={model.head_dim} is odd; rotary embeddings need an even one")
    check_mixers(model)


def check_mixers(model: ModelConfig) -> None:
    """What gated linear attention, pairs and meta tokens are made of fits together."""
    gla, meta = model.gla, model.meta
    for key, value in {"gate_rank": gla.gate_rank, "gate_normalizer": gla.gate_normalizer}.items():
        if not value > 0:
            raise ValueError(f"model.gla.{key}={value} must be greater than 0")
    if gla.gate is Gate.tied and gla.feature_map is not FeatureMap.sigmoid:
        raise ValueError(
            f"model.gla.gate=tied is 1 - key, which the feature map {gla.feature_map.name} can make negative; set "
            "model.gla.feature_map=sigmoid"
        )
    if not 0 <= gla.lower_bound < 1:
        raise ValueError(f"model.gla.lower_bound={gla.lower_bound} must be at least 0 and less than 1")
    if gla.lower_bound and gla.gate is not Gate.tied:
        raise ValueError(
            f"model.gla.lower_bound={gla.lower_bound} is of a tied gate; set model.gla.gate=tied or drop it"
        )
    for key, value in {"num_tokens": meta.num_tokens, "init_std": meta.init_std}.items():
        if not value >= 0:
            raise ValueError(f"model.meta.{key}={value} must be 0 or more")
    if model.pair.calibration_tokens < 1:
        raise ValueError(f"model.pair.calibration_tokens={model.pair.calibration_tokens} must be 1 or more")


def teacher_cut_problem(model: ModelConfig, layout: Layout, *, row_tokens: int) -> str | None:
    """cut_problem of the unconverted model, which has no meta tokens."""
    return cut_problem(replace(model, meta=replace(model.meta, num_tokens=0)), layout, row_tokens=row_tokens)


def cut_problem(model: ModelConfig, layout: Layout, *, row_tokens: int) -> str | None:
    """Why a row's tokens cannot be cut into equal shards, to be read behind their number; or None.

    Every sp rank has the meta tokens before its shard, and tp_sequence_parallel cuts both together.
    """
    parts, num_meta = layout.tp if layout.tp_sequence_parallel else 1, model.meta.num_tokens
    if row_tokens % layout.sp == 0 and (num_meta + row_tokens // layout.sp) % parts == 0:
        return None
    if num_meta and parts > 1:
        each = f"layout.sp={layout.sp} shards, with model.meta.num_tokens={num_meta} before each,"
        return f" cannot be cut into {each} of which tp {parts} holds equal parts"
    return f" cannot be cut into the {layout.sp * parts} shards"
