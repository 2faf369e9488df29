"""The shape of a Hugging Face checkpoint, read from its config.json alone, and the merge of it into a recipe.

Families whose blocks this project converts: qwen2 (also Qwen2.5), qwen3 and llama. Anything in the file that would
make the model compute something else than those blocks is refused here, with the key and its value. Where a key is
absent the default is the one of the family's configuration class in transformers (5.x), except that an absent
num_key_value_heads means one per query head.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbtrain.config.export_shape import contradiction, is_export, model_of_export
from sbtrain.config.model_schema import ModelConfig, RopeScaling
from sbtrain.config.spiking_export import with_released_spiking

FAMILIES = ("llama", "qwen2", "qwen3")

_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
}
_DEFAULT_POSITIONS = {"qwen2": 32768, "qwen3": 32768, "llama": 2048}


def read_shape(folder: str | Path) -> dict[str, Any]:
    """ModelConfig fields of the checkpoint in `folder`. Raises ValueError naming the file and the key."""
    path, config = Path(folder) / "config.json", read_config(folder)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    _refuse_other_blocks(config, family, path)
    shape: dict[str, Any] = {field: _positive(config, key, path) for field, key in _KEYS.items()}
    kv_heads = config.get("num_key_value_heads")
    shape["num_kv_heads"] = shape["num_heads"] if kv_heads is None else _positive(config, "num_key_value_heads", path)
    shape["head_dim"] = _head_dim(config, family, shape, path)
    shape["norm_eps"] = _number(config, "rms_norm_eps", path, default=1e-6)
    positions = {"max_position_embeddings": _DEFAULT_POSITIONS[family], **config}
    shape["max_positions"] = _positive(positions, "max_position_embeddings", path)
    shape["rope_theta"], shape["rope_scaling"] = _rope(config, path, max_positions=shape["max_positions"])
    shape["tie_embeddings"] = _flag(config, "tie_word_embeddings", path)
    shape["qkv_bias"] = family == "qwen2"
    shape["qk_norm"] = family == "qwen3"
    return shape


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder. Raises ValueError naming the folder, as start.path, or the file.

    Where that is the released INT8 model's, it gets the keys that our exports of such a model have.
    """
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise ValueError(f"start.path={path.parent} is not a folder; give one with config.json and safetensors files")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"start.path={path.parent} has no config.json; give a Hugging Face model folder") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); fetch the file again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; fetch the file again")
    return with_released_spiking(config, path.parent)


def complete_shape(model: ModelConfig, folder: str, *, may_be_absent: bool = False) -> ModelConfig:
    """`model` with its None fields filled from `folder`/config.json; given fields must agree with it.

    folder: `start.path`; empty means that the recipe alone defines the shape. may_be_absent: a folder that does not
    exist is no error (a dry run needs no weights). Raises ValueError naming model.<field> and start.path.
    """
    shape: dict[str, Any] = {}
    if folder and not (may_be_absent and not Path(folder).exists()):
        shape = _shape_of_export(model, folder) if is_export(read_config(folder)) else read_shape(folder)
    for field, theirs in shape.items():
        ours = getattr(model, field)
        if field == "max_positions" and ours is not None:  # what training extends, no part of the shape
            shape = {**shape, field: ours}
        elif ours is not None and ours != theirs:
            raise ValueError(
                f"model.{field}={ours} contradicts {field} {theirs} of start.path={folder}; "
                f"drop model.{field} or choose the checkpoint that has it"
            )
    model = replace(model, **shape)
    for field in (
        *_KEYS,
        "num_kv_heads",
        "head_dim",
        "norm_eps",
        "rope_theta",
        "max_positions",
        "tie_embeddings",
        "qkv_bias",
        "qk_norm",
    ):
        if getattr(model, field) is None:
            where = f"start.path={folder} does not exist" if folder else "start.path is empty"
            raise ValueError(
                f"model.{field} is not known: {where}; set start.path to a Hugging Face folder, or give model.{field}"
            )
    return model


def _shape_of_export(model: ModelConfig, folder: str) -> dict[str, Any]:
    """The fields that a recipe may leave open, of a folder that sbtrain has exported; it has the recipe's layers."""
    theirs = model_of_export(read_config(folder), Path(folder) / "config.json")
    problem = contradiction(model, theirs)
    if problem:
        raise ValueError(f"{problem} of start.path={folder}; a model that sbtrain has exported goes on as it is")
    open_fields = ("num_kv_heads", "head_dim", "norm_eps", "rope_theta", "rope_scaling", "max_positions")
    return {field: getattr(theirs, field) for field in (*_KEYS, *open_fields, "tie_embeddings", "qkv_bias", "qk_norm")}


def _refuse_other_blocks(config: dict[str, Any], family: str, path: Path) -> None:
    only_full = "only full-attention checkpoints convert"
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"{path}: layer_types is {layer_types!r} and must be a list; fetch the file again")
    bias = _flag(config, "attention_bias", path)
    refused = {
        "attention_bias": family != "qwen2" and bias and "o_proj would have a bias",
        "mlp_bias": family == "llama" and _flag(config, "mlp_bias", path) and "the FFN would have biases",
        "hidden_act": config.get("hidden_act", "silu") != "silu" and "only silu (SwiGLU) is supported",
        "use_sliding_window": _flag(config, "use_sliding_window", path) and only_full,
        "layer_types": any(kind != "full_attention" for kind in layer_types) and only_full,
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0 and "only full rotary is supported",
    }
    for key, reason in refused.items():
        if reason:
            raise ValueError(f"{path}: {key} {config[key]!r} is not supported: {reason}; choose another checkpoint")


def _flag(config: dict[str, Any], key: str, path: Path) -> bool:
    value = config.get(key)
    if value not in (None, True, False):
        raise ValueError(f"{path}: {key} is {value!r} and must be true or false; fetch the file again")
    return bool(value)


def _number(config: dict[str, Any], key: str, path: Path, *, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} is {value!r} and must be a positive number; fetch the file again")
    return float(value)


def _positive(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path}: {key} is {value!r} and must be a positive integer; fetch the file again")
    return value


def _head_dim(config: dict[str, Any], family: str, shape: dict[str, Any], path: Path) -> int:
    if config.get("head_dim") is not None:
        return _positive(config, "head_dim", path)
    if family == "qwen3":
        return 128  # the family's default; the others derive it
    if shape["hidden_size"] % shape["num_heads"]:
        raise ValueError(
            f"{path}: head_dim is absent and hidden_size {shape['hidden_size']} is no multiple of "
            f"num_attention_heads {shape['num_heads']}; add head_dim"
        )
    return shape["hidden_size"] // shape["num_heads"]


def _rope(config: dict[str, Any], path: Path, *, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    key = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: {key} is {rope!r} and must hold keys; fetch the file again")
    theta = _number({**config, **rope}, "rope_theta", path, default=10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{path}: {key} of type {kind!r} is not supported; supported: default, llama3")
    rope = {"original_max_position_embeddings": max_positions, **rope}  # as transformers does
    missing = [name for name in ("factor", "low_freq_factor", "high_freq_factor") if name not in rope]
    if missing:
        raise ValueError(f"{path}: {key} of type 'llama3' lacks {missing[0]}; fetch the file again")
    return theta, RopeScaling(
        factor=_number(rope, "factor", path),
        low_freq_factor=_number(rope, "low_freq_factor", path),
        high_freq_factor=_number(rope, "high_freq_factor", path),
        original_max_positions=_positive(rope, "original_max_position_embeddings", path),
    )
