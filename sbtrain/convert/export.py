"""From a training checkpoint to a Hugging Face folder that transformers runs.

Two formats. `gla_swa` is the one of the released SpikingBrain-7B: its config.json and key names, so its modeling code
loads the folder as well as ours does. `sbtrain` is our own superset for models that the released code cannot express.
Tensors stream one by one into a folder beside the target, are read back, and the folder gets its name at the end:
a target that exists is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sbtrain.checkpoint.files import read_json, write_json
from sbtrain.config.schema import ModelConfig, Recipe
from sbtrain.convert.reader import CheckpointReader
from sbtrain.convert.shards import DTYPES, ShardWriter
from sbtrain.convert.weights import EMBEDDING, symbols, table
from sbtrain.data import tokenizer as tokenizers

FORMATS = ("hf", "gla_swa", "sbtrain")
_MODELING = Path(__file__).parent / "hf_model"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_RENAMED = {
    "embed_tokens": "embeddings",
    "input_layernorm": "attn_norm",
    "self_attn": "attn",
    "post_attention_layernorm": "mlp_norm",
}
_RELEASED_GATE = (16, 16.0)


class GlobalReader(Protocol):
    """What exports need of a training checkpoint; CheckpointReader is one."""

    def get(self, name: str) -> Tensor: ...


def export(
    reader: GlobalReader,
    *,
    model: ModelConfig,
    out: str | Path,
    tokenizer_dir: str | Path = "",
    source_dir: str | Path = "",
    dtype: str = "bf16",
    format: str = "hf",
    max_shard_bytes: int = 5_000_000_000,
) -> str:
    """Write the folder `out` and return the format it has, gla_swa or sbtrain.

    out: must not exist or be empty. tokenizer_dir: its tokenizer files are taken along; "" takes none.
    source_dir: generation_config.json and the special token ids of config.json are its own, or else tokenizer_dir's.
    dtype: bf16, fp16 or fp32.
    format: hf writes gla_swa where the released code can hold the model, else sbtrain.
    Raises ValueError, one line, before anything is written where that is possible; never leaves a partial `out`.
    """
    out = Path(out)
    form = _choose_format(format, model)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not known; choose one of {', '.join(DTYPES)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out={out} exists; choose another folder or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(partial, reader, model=model, form=form, dtype=dtype, max_shard_bytes=max_shard_bytes, out=out)
        _write_config(partial, model, form=form, dtype=dtype)
        _take_along(partial, [Path(place) for place in (source_dir, tokenizer_dir) if place], tokenizer_dir)
        os.rename(partial, out)
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error}); free space or choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return form


def export_checkpoint(
    step_dir: str | Path, *, recipe: Recipe, out: str | Path, format: str = "hf", dtype: str = ""
) -> str:
    """Export checkpoints/step_N of a run; the tokenizer is data.tokenizer, or start.path's where none is named.

    dtype "" is the run's own precision. For one process (rank 0 of a run). See `export` for the rest.
    """
    dtype = dtype or recipe.precision.value
    folders = [folder for folder in (recipe.data.tokenizer, recipe.start.path) if folder]
    with_tokenizer = [folder for folder in folders if (Path(folder) / "tokenizer.json").is_file()]
    tokenizer_dir = next(iter([*with_tokenizer, *folders]), "")
    longest = max(stage.seq_len for stage in recipe.stages.values())
    model = replace(recipe.model, max_positions=max(recipe.model.max_positions, longest))
    return export(
        CheckpointReader(step_dir),
        model=model,
        out=out,
        tokenizer_dir=tokenizer_dir,
        source_dir=recipe.start.path,
        dtype=dtype,
        format=format,
    )


def gla_swa_refusal(model: ModelConfig) -> str | None:
    """Why the released SpikingBrain-7B modeling code cannot hold this model; None if it can."""
    gate = (model.gla.gate_rank, model.gla.gate_normalizer)
    reasons = [
        (model.qk_norm, "its attention has no q/k norms"),
        ("F" in symbols(model), "it has no full-attention layers"),
        (model.num_heads * model.head_dim != model.hidden_size, "its head_dim is hidden_size / num_heads"),
        (model.rope_scaling is not None, "its RoPE has no scaling"),
        ("L" in symbols(model) and gate != _RELEASED_GATE, "its gate has rank 16 and normalizer 16"),
    ]
    return next((reason for refused, reason in reasons if refused), None)


def export_tensors(reader: GlobalReader, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The model under the names of its Hugging Face source family, one tensor at a time, vocabulary padding removed.

    The parameters of L layers that the family does not know are self_attn.gk_proj.0, gk_proj.1 and g_norm. A tied
    model has no lm_head.
    """
    for row in table(model):
        yield from row.export(reader.get(row.name)).items()


def released_name(name: str) -> str:
    """A name of the source family in the naming of the released SpikingBrain-7B, which both formats use."""
    return ".".join(_RENAMED.get(part, part) for part in name.split("."))


def _choose_format(format: str, model: ModelConfig) -> str:
    if format not in FORMATS:
        raise ValueError(f"format={format} is not known; choose one of {', '.join(FORMATS)}")
    reason = gla_swa_refusal(model)
    if format == "gla_swa" and reason:
        raise ValueError(f"format=gla_swa: the released code cannot hold this model, {reason}; use format=hf")
    if format == "hf":
        return "sbtrain" if reason else "gla_swa"
    return format


@torch.no_grad()
def _write(
    folder: Path, reader: GlobalReader, *, model: ModelConfig, form: str, dtype: str, max_shard_bytes: int, out: Path
) -> None:
    added = _added(model) if form == "gla_swa" else {}
    shapes = {released_name(source.name): source.shape for row in table(model) for source in row.sources}
    shapes |= added
    writer = ShardWriter(folder, shapes, dtype=DTYPES[dtype], max_shard_bytes=max_shard_bytes)
    free_bytes = shutil.disk_usage(folder).free
    if writer.size_bytes > free_bytes:
        raise ValueError(f"out={out}: {free_bytes} bytes are free, the export needs {writer.size_bytes}; free space")
    for name, tensor in export_tensors(reader, model):
        writer.append(released_name(name), tensor)
    for name, shape in added.items():
        is_output = name == "lm_head.weight"
        writer.append(name, reader.get(EMBEDDING)[: model.vocab_size] if is_output else torch.zeros(shape))
    writer.close()
    writer.check()


def _added(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that the released code has and this model lacks: biases of zero, an output matrix of its own."""
    added = {}
    rows = {"q": model.num_heads * model.head_dim}
    rows["k"] = rows["v"] = model.num_kv_heads * model.head_dim
    if not model.qkv_bias:
        for layer in range(model.num_layers):
            added |= {f"model.layers.{layer}.attn.{x}_proj.bias": (size,) for x, size in rows.items()}
    if model.tie_embeddings:
        added["lm_head.weight"] = (model.vocab_size, model.hidden_size)
    return added


def _write_config(folder: Path, model: ModelConfig, *, form: str, dtype: str) -> None:
    write_json(folder / "config.json", _config(model, form=form, dtype=dtype))
    for path in _MODELING.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copyfile(path, folder / path.name)


def _take_along(folder: Path, places: list[Path], tokenizer_dir: str | Path) -> None:
    """Tokenizer files, and what the first of `places` that has it says of special tokens and generation."""
    for name in _TOKENIZER_FILES if tokenizer_dir else ():
        if (Path(tokenizer_dir) / name).is_file():
            shutil.copyfile(Path(tokenizer_dir) / name, folder / name)
    config = read_json(folder / "config.json")
    for place in reversed(places):
        if (place / "generation_config.json").is_file():
            shutil.copyfile(place / "generation_config.json", folder / "generation_config.json")
        theirs = read_json(place / "config.json") if (place / "config.json").is_file() else {}
        config |= {key: theirs[key] for key in _SPECIAL_IDS if theirs.get(key) is not None}
    if config["eos_token_id"] is None and (folder / "tokenizer.json").is_file():
        config["eos_token_id"] = tokenizers.load(tokenizer_dir).eos_id  # what training has put behind every document
    write_json(folder / "config.json", config)


def _config(model: ModelConfig, *, form: str, dtype: str) -> dict[str, Any]:
    """config.json: the released fields, and for our own format what they cannot say."""
    kinds = "".join(symbols(model))
    name = "GLAswa" if form == "gla_swa" else "SbtrainHybrid"
    config = {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_gla_swa.{name}Config",
            "AutoModelForCausalLM": f"modeling_gla_swa.{name}ForCausalLM",
        },
        "model_type": "gla_swa" if form == "gla_swa" else "sbtrain_hybrid",
        "attention_dropout": 0.0,
        "attn_layers": [layer for layer, kind in enumerate(kinds) if kind == "S"],
        "attn_mode": "chunk",
        "bos_token_id": None,
        "conv_size": 4,
        "elementwise_affine": True,
        "eos_token_id": None,
        "fuse_cross_entropy": True,
        "gate_logit_normalizer": model.gla.gate_normalizer,
        "gate_low_rank_dim": model.gla.gate_rank,
        "hidden_act": "swish",
        "hidden_size": model.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": model.max_positions,
        "norm_eps": model.norm_eps,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "pad_token_id": None,
        "rope_theta": model.rope_theta,
        "sliding_window": model.window - 1,
        "tie_word_embeddings": False,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "use_cache": True,
        "use_short_conv": False,
        "vocab_size": model.vocab_size,
    }
    if form == "sbtrain":
        config |= _own_config(model, kinds)
    return config


def _own_config(model: ModelConfig, kinds: str) -> dict[str, Any]:
    scaling = model.rope_scaling
    return {
        "layer_kinds": kinds,
        "head_dim": model.head_dim,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "tie_word_embeddings": model.tie_embeddings,
        "llama3_rope": scaling
        and {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_positions": scaling.original_max_positions,
        },
    }
