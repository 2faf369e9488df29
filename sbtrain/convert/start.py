"""The first weights of a run: inherited from a Hugging Face checkpoint, converted, or drawn from the seed.

Each rank fills its own parameters in place, one source tensor at a time, so a start needs the rank's shard and little
more. What is drawn depends on the seed and the parameter's name alone, never on the layout: the whole tensor is drawn
in fp32 on the CPU and then cut (of experts, one after the other). A folder that sbtrain has exported is read as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping as Named
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sbtrain.config.export_shape import is_export
from sbtrain.config.hf_shape import read_config
from sbtrain.config.schema import ModelConfig
from sbtrain.convert.attention import MERGE_NORMS, draw_new
from sbtrain.convert.exported import check_exported, copy_exported
from sbtrain.convert.hf import HFCheckpoint
from sbtrain.convert.mapping import Fill, Mapping, Part
from sbtrain.convert.weights import EMBEDDING, META, OUTPUT, check_names, inherited, table

SCRATCH_STD = 0.02


@torch.no_grad()
def fill(
    parameters: dict[str, Tensor],
    *,
    model: ModelConfig,
    path: str,
    seed: int,
    tp_rank: int = 0,
    tp: int = 1,
    ep_rank: int = 0,
    ep: int = 1,
    buffers: dict[str, Tensor] | None = None,
    merge_norms: Named[int, float] | None = None,
    meta_ids: Sequence[int] = (),
) -> None:
    """Fill the parameters of one rank.

    parameters: this pipeline stage's local tensors (any float dtype, any device) by global name. A tied model's last
        stage may hold a copy of the embedding under output_layer.weight.
    buffers: its buffers; those that exports have are filled as well.
    path: a Hugging Face folder, of a source family or exported by us; "" draws everything from the seed (matrices
        N(0, 0.02), norms one, biases zero).
    merge_norms: value of the norms of a converted pair by layer (see sbtrain.convert.calibrate); 1 where absent.
    meta_ids: tokens whose embeddings a conversion's meta tokens copy; none: they are drawn.
    Raises ValueError, one line, when a tensor is missing, unused, of another shape or dtype, or when the parameters
    are not those of the model.
    """
    part, from_export = Part(tp_rank, tp, ep_rank, ep), starts_from_export(path)
    rows = rows_of(model, inherits=bool(path) and not from_export)
    _check_parameters(parameters, rows, part)
    parameters = {**parameters, **{name: tensor for name, tensor in (buffers or {}).items() if name in rows}}
    if from_export:
        copy_exported(parameters, rows, path=path, part=part)
        return
    reader = None
    if path:
        reader = HFCheckpoint(path)
        check_names(reader.names(), list(rows.values()), model=model, where=path)
    for name, parameter in parameters.items():
        row = rows[name]
        if reader is not None and not row.new:
            row.copy_into(parameter, reader, part)
        elif reader is not None and meta_ids and name == META:
            embedding = rows[EMBEDDING].sources[0].name
            parameter.copy_(torch.cat([reader.get_slice(embedding, 0, token, token + 1) for token in meta_ids]))
        else:
            draw = partial(_draw, row, seed=seed, norm=_norm(row, model, merge_norms or {}), scratch=reader is None)
            row.draw_into(parameter, draw, part)


def check_source(path: str, *, model: ModelConfig) -> None:
    """Raise what `fill` would raise about the checkpoint at path. Reads headers alone."""
    if starts_from_export(path):
        check_exported(path, table(model))
        return
    reader, rows = HFCheckpoint(path), inherited(model)
    check_names(reader.names(), rows, model=model, where=path)
    for row in rows:
        if not row.new:
            row.check(reader)


def starts_from_export(path: str) -> bool:
    """Whether path is a folder that sbtrain has exported, which is read and not converted."""
    return bool(path) and is_export(read_config(path))


def new_parameters(model: ModelConfig) -> set[str]:
    """Global names of the parameters that the teacher did not have (they may get a learning rate of their own)."""
    return {row.name for row in table(model) if row.new}


def rows_of(model: ModelConfig, *, inherits: bool) -> dict[str, Mapping]:
    """The model's mappings by name, as a pipeline stage may hold them. inherits: from the source family's tensors."""
    rows = {row.name: row for row in (inherited(model) if inherits else table(model))}
    if model.tie_embeddings:
        rows[OUTPUT] = rows[EMBEDDING]
    return rows


def _norm(row: Mapping, model: ModelConfig, merge_norms: Named[int, float]) -> float:
    """First value of a norm that conversion adds."""
    if MERGE_NORMS in row.name:
        return merge_norms.get(int(row.name.split(".")[2]), 1.0)
    return model.gla.out_norm_init


def _draw(row: Mapping, name: str, shape: tuple[int, ...], *, seed: int, norm: float, scratch: bool) -> Tensor:
    """A whole tensor, fp32, CPU, from (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if not scratch:
        return draw_new(row, shape, generator, norm=norm)
    if row.fill is Fill.norm:
        return torch.ones(shape)
    std = SCRATCH_STD if row.std is None else row.std
    whole = torch.zeros(shape)
    return whole.normal_(0, std, generator=generator) if row.fill is Fill.matrix else whole


def _check_parameters(parameters: dict[str, Tensor], rows: dict[str, Mapping], part: Part) -> None:
    """The stage's parameters are the model's: none unknown, no part of a layer absent, every shard of its shape."""
    for name, parameter in parameters.items():
        if name not in rows:
            raise ValueError(f"parameter {name} is not in the conversion table; was the model built from this recipe?")
        shape = rows[name].local_shape(part)
        if tuple(parameter.shape) != shape:
            _, ranks, axis = rows[name].cut(part)
            raise ValueError(
                f"parameter {name} has shape {list(parameter.shape)}, {axis} {ranks} of it is {list(shape)}"
            )
    layers = {_layer(name) for name in parameters} - {""}
    wanted = [name for name, row in rows.items() if _layer(name) in layers and not row.buffer]
    absent = [name for name in wanted if name not in parameters]
    if absent:
        raise ValueError(f"the model was built without parameter {absent[0]}, its configuration says that it has one")


def _layer(name: str) -> str:
    """decoder.layers.7.mlp... -> decoder.layers.7, and "" outside the layers."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["decoder", "layers"] else ""
