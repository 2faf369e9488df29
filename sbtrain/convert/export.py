"""From a training checkpoint to a Hugging Face folder that transformers runs.

Three formats, see sbtrain.convert.export_config: `gla_swa` is the one of the released SpikingBrain-7B, `sbtrain` is
our own superset of it, `sbtrain_moe` is for pairs of mixers, meta tokens and experts; w8aspike is one of them with INT8
weights. Tensors stream one by one into a folder beside the target, are read back, and the folder gets its name at the
end: a target that exists is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sbtrain.checkpoint.files import read_json, write_json
from sbtrain.checkpoint.reading import read_state
from sbtrain.config.schema import ModelConfig, Recipe
from sbtrain.convert.calibrated import Calibrated, Int8Reader
from sbtrain.convert.export_config import MODEL_TYPES, W8ASPIKE, choose_format, config_of, modeling_files
from sbtrain.convert.mapping import Mapping
from sbtrain.convert.names import exported_name, projection_of, scales_name
from sbtrain.convert.reader import CheckpointReader, GlobalReader
from sbtrain.convert.shards import DTYPES, ShardWriter
from sbtrain.convert.weights import EMBEDDING, table
from sbtrain.data import tokenizer as tokenizers
from sbtrain.spiking.quantize import quantize

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


def export(
    reader: GlobalReader,
    *,
    model: ModelConfig,
    out: str | Path,
    tokenizer_dir: str | Path = "",
    source_dir: str | Path = "",
    dtype: str = "bf16",
    format: str = "hf",
    calibrated: Calibrated | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> str:
    """Write the folder `out` and return the format it has, gla_swa, sbtrain or sbtrain_moe.

    out: must not exist or be empty. tokenizer_dir: its tokenizer files are taken along; "" takes none.
    source_dir: generation_config.json and the special token ids of config.json are its own, or else tokenizer_dir's.
    dtype: bf16, fp16 or fp32.
    format: hf writes the first of gla_swa, sbtrain and sbtrain_moe that can hold the model, w8aspike does with INT8
        weights. calibrated: these, where format is w8aspike; of the same model and the same weights.
    Raises ValueError, one line, before anything is written where that is possible; never leaves a partial `out`.
    """
    out = Path(out)
    if format == W8ASPIKE:
        model, reader = _int8(model, reader, calibrated)
    form = choose_format(format, model)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not known; choose one of {', '.join(DTYPES)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out={out} exists; choose another folder or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(partial, reader, model=model, form=form, dtype=dtype, max_shard_bytes=max_shard_bytes, out=out)
        _write_config(partial, model, form=form, dtype=dtype, int8_weights=format == W8ASPIKE)
        _take_along(partial, [Path(place) for place in (source_dir, tokenizer_dir) if place], tokenizer_dir)
        os.rename(partial, out)
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error}); free space or choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return form


def _int8(model: ModelConfig, reader: GlobalReader, calibrated: Calibrated | None) -> tuple[ModelConfig, Int8Reader]:
    if calibrated is None:
        raise ValueError("format=w8aspike needs calibrated weights; make them with launch/calibrate.py")
    calibrated.check(model, reader)
    return replace(calibrated.model, max_positions=model.max_positions), Int8Reader(reader, model, calibrated)


def export_checkpoint(
    step_dir: str | Path,
    *,
    recipe: Recipe,
    out: str | Path,
    format: str = "hf",
    dtype: str = "",
    calibrated: Calibrated | None = None,
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
        calibrated=calibrated,
    )


def warm_in_note(step_dir: str | Path, model: ModelConfig) -> str | None:
    """A line for the user where a checkpoint was trained to spike in part, as its export does wholly; else None."""
    if not (model.spiking.enabled and model.spiking.warm_in_tokens):
        return None
    share = model.spiking.share_after(read_state(Path(step_dir))["tokens"])
    if share == 1:
        return None
    return (
        f"{step_dir} was trained with {share:.1%} of activations replaced by spikes (model.spiking.warm_in_tokens); "
        "the export replaces all"
    )


def export_tensors(reader: GlobalReader, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The model under the names of its Hugging Face source family, one tensor at a time, vocabulary padding removed.

    What the family does not know has the names of `sbtrain.convert.weights.table`, such as self_attn.g_norm. A tied
    model has no lm_head.
    """
    for row in table(model):
        yield from row.export(reader.get(row.name)).items()


@torch.no_grad()
def _write(
    folder: Path, reader: GlobalReader, *, model: ModelConfig, form: str, dtype: str, max_shard_bytes: int, out: Path
) -> None:
    added, model_type, rows = _added(model) if form == "gla_swa" else {}, MODEL_TYPES[form], table(model)
    scales = _scales(rows, reader, dtype=DTYPES[dtype]) if isinstance(reader, Int8Reader) else {}
    scales = {exported_name(name, model_type): tensor for name, tensor in scales.items()}
    shapes = {exported_name(source.name, model_type): source.shape for row in rows for source in row.sources}
    shapes |= {**added, **{name: tuple(tensor.shape) for name, tensor in scales.items()}}
    wide = {exported_name(source.name, model_type) for row in rows if row.buffer for source in row.sources}
    wide = frozenset(wide | set(scales))
    writer = ShardWriter(folder, shapes, dtype=DTYPES[dtype], max_shard_bytes=max_shard_bytes, wide=wide)
    free_bytes = shutil.disk_usage(folder).free
    if writer.size_bytes > free_bytes:
        raise ValueError(f"out={out}: {free_bytes} bytes are free, the export needs {writer.size_bytes}; free space")
    for name, tensor in export_tensors(reader, model):
        writer.append(exported_name(name, model_type), tensor)
    for name, shape in added.items():
        is_output = name == "lm_head.weight"
        writer.append(name, reader.get(EMBEDDING)[: model.vocab_size] if is_output else torch.zeros(shape))
    for name, tensor in scales.items():
        writer.append(name, tensor)
    writer.close()
    writer.check()


def _scales(rows: list[Mapping], reader: Int8Reader, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Scales of all projections by the family's names, after checking that dtype keeps their weights' integers."""
    scales = {}
    for row in rows:
        if projection_of(row.name) is None:
            continue
        of_row = reader.scales(row.name)
        if row.name in reader.int8_names and not torch.equal(
            quantize(reader.get(row.name).to(dtype), of_row), reader.integers(row.name)
        ):
            raise ValueError(
                f"dtype={str(dtype).removeprefix('torch.')} cannot hold the INT8 weight {row.name}; use bf16"
            )
        views = zip(row.sources, row.views(of_row))
        scales |= {scales_name(source.name): view.reshape(source.shape[0], -1, 1) for source, view in views}
    return scales


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


def _write_config(folder: Path, model: ModelConfig, *, form: str, dtype: str, int8_weights: bool) -> None:
    write_json(folder / "config.json", config_of(model, form=form, dtype=dtype, int8_weights=int8_weights))
    for name in modeling_files(form):
        shutil.copyfile(_MODELING / name, folder / name)


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
