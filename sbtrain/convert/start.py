"""The first weights of a run: inherited from a Hugging Face checkpoint, converted, or drawn from the seed.

Each rank fills its own parameters in place, one source tensor at a time, so a start needs the rank's shard and little
more. What is drawn depends on the seed and the parameter's name alone, never on the layout: the whole tensor is drawn
in fp32 on the CPU and then cut.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sbtrain.config.schema import ModelConfig
from sbtrain.convert.attention import draw_new
from sbtrain.convert.hf import HFCheckpoint
from sbtrain.convert.mapping import Fill, Mapping, Vocab
from sbtrain.convert.weights import EMBEDDING, OUTPUT, check_names, table

SCRATCH_STD = 0.02


@torch.no_grad()
def fill(
    parameters: dict[str, Tensor], *, model: ModelConfig, path: str, seed: int, tp_rank: int = 0, tp: int = 1
) -> None:
    """Fill the parameters of one rank.

    parameters: this pipeline stage's local tensors (any float dtype, any device) by global name. A tied model's last
        stage may hold a copy of the embedding under output_layer.weight.
    path: a Hugging Face folder; "" draws everything from the seed (matrices N(0, 0.02), norms one, biases zero).
    Raises ValueError, one line, when a tensor is missing, unused, of another shape or dtype, or when the parameters
    are not those of the model.
    """
    rows = {row.name: row for row in table(model)}
    if model.tie_embeddings:
        rows[OUTPUT] = rows[EMBEDDING]
    _check_parameters(parameters, rows, tp=tp)
    reader = None
    if path:
        reader = HFCheckpoint(path)
        check_names(reader.names(), list(rows.values()), model=model, where=path)
    for name, parameter in parameters.items():
        row = rows[name]
        if reader is not None and not row.new:
            row.copy_into(parameter, reader, tp_rank=tp_rank, tp=tp)
        else:
            whole = _draw(row, model, seed=seed, scratch=reader is None)
            row.shard_into(parameter, whole, tp_rank=tp_rank, tp=tp)


def check_source(path: str, *, model: ModelConfig) -> None:
    """Raise what `fill` would raise about the checkpoint at path. Reads headers alone."""
    reader, rows = HFCheckpoint(path), table(model)
    check_names(reader.names(), rows, model=model, where=path)
    for row in rows:
        if not row.new:
            row.check(reader)


def new_parameters(model: ModelConfig) -> set[str]:
    """Global names of the parameters that the teacher did not have (they may get a learning rate of their own)."""
    return {row.name for row in table(model) if row.new}


def _draw(row: Mapping, model: ModelConfig, *, seed: int, scratch: bool) -> Tensor:
    """The whole parameter, fp32, CPU, from (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{row.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if not scratch:
        return draw_new(row, generator, out_norm=model.gla.out_norm_init)
    if row.fill is Fill.norm:
        return torch.ones(row.shape)
    shape = row.sources[0].shape if isinstance(row, Vocab) else row.shape
    whole = torch.zeros(shape)
    return whole.normal_(0, SCRATCH_STD, generator=generator) if row.fill is Fill.matrix else whole


def _check_parameters(parameters: dict[str, Tensor], rows: dict[str, Mapping], *, tp: int) -> None:
    """The stage's parameters are the model's: none unknown, no part of a layer absent, every shard of its shape."""
    for name, parameter in parameters.items():
        if name not in rows:
            raise ValueError(f"parameter {name} is not in the conversion table; was the model built from this recipe?")
        shape = rows[name].local_shape(tp)
        if tuple(parameter.shape) != shape:
            raise ValueError(f"parameter {name} has shape {list(parameter.shape)}, tp {tp} of it is {list(shape)}")
    layers = {_layer(name) for name in parameters} - {""}
    absent = [name for name in rows if _layer(name) in layers and name not in parameters]
    if absent:
        raise ValueError(f"the model was built without parameter {absent[0]}, its configuration says that it has one")


def _layer(name: str) -> str:
    """decoder.layers.7.mlp... -> decoder.layers.7, and "" outside the layers."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["decoder", "layers"] else ""
