"""INT8 weights between calibration and export: a folder of calibration.json and a safetensors file for each layer.

A file holds, by our global names, int8 weights NAME and their scales NAME.scales, fp32. calibration.json, written last,
says of which model and how, and has a checksum of every tensor. The folder gets its name when it is whole.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sbtrain.checkpoint.files import read_json, sync_folder, write_json
from sbtrain.config import typed
from sbtrain.config.model_schema import Gate, ModelConfig
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.convert.names import projection_of
from sbtrain.convert.reader import GlobalReader
from sbtrain.convert.weights import table
from sbtrain.spiking.quantize import dequantize

FILE = "calibration.json"
VERSION = 2
SCALES = ".scales"


def int8_model(model: ModelConfig, spiking: SpikingConfig) -> ModelConfig:
    """What a model becomes with INT8 weights: its low-rank gates are one matrix each, and it spikes."""
    gate = Gate.full_rank if model.gla.gate is Gate.low_rank else model.gla.gate
    return replace(model, gla=replace(model.gla, gate=gate), spiking=replace(spiking, enabled=True, warm_in_tokens=0))


def int8_names(model: ModelConfig) -> list[str]:
    """Global names of the weights that an INT8 model rounds, layer by layer; `model` is that of int8_model.

    Raises ValueError, one line, where it cannot be: experts, and groups that do not divide.
    """
    with_experts = [i for i, kind in enumerate(parse_pattern(model.pattern, model.num_layers)) if kind.moe]
    if with_experts:
        raise ValueError(
            f"model.pattern: layer {with_experts[0]} is a mixture of experts, which are not calibrated; INT8 weights "
            "are for models with dense FFNs"
        )
    names, group = [], model.spiking.weight_group
    for row in table(model):
        where = projection_of(row.name)
        if where is None or not model.spiking.spikes(*where):
            continue
        if row.shape[1] % group:
            raise ValueError(
                f"model.spiking.weight_group={group} does not divide the {row.shape[1]} input channels of projection "
                f"{where[0]}; set one that does, or weight_group=N here, or leave it out with model.spiking.skip"
            )
        names.append(row.name)
    return names


class MergedGates:
    """The tensors of `reader` with every low-rank gate as one matrix, gate.weight = up down, in fp32."""

    def __init__(self, reader: GlobalReader, model: ModelConfig):
        """model: that of the reader."""
        self._reader, self._low_rank = reader, model.gla.gate is Gate.low_rank

    def get(self, name: str) -> Tensor:
        """See GlobalReader."""
        prefix, _, leaf = name.rpartition(".gate.")
        if not prefix or not self._low_rank:
            return self._reader.get(name)
        up = self._reader.get(f"{prefix}.gate_up.{leaf}")
        return up if leaf == "bias" else up.float() @ self._reader.get(f"{prefix}.gate_down.weight").float()


class Writer:
    """Writes the folder `out`, which must not exist; use as a context, which leaves nothing behind unless finished."""

    def __init__(self, out: str | Path):
        self.out, self._checksums = Path(out), {}
        self._partial = self.out.with_name(self.out.name + ".partial")

    def __enter__(self) -> Writer:
        shutil.rmtree(self._partial, ignore_errors=True)
        with _in_one_line(self.out):
            self._partial.mkdir(parents=True)
        return self

    def __exit__(self, *failed) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, layer: int, weights: dict[str, tuple[Tensor, Tensor]]) -> None:
        """One layer's weights: name -> (int8 [F, D], scales [F, D / group, 1])."""
        tensors = {}
        for name, (integers, scales) in weights.items():
            tensors |= {name: integers.cpu().contiguous(), name + SCALES: scales.float().cpu().contiguous()}
        self._checksums |= {name: checksum(tensor) for name, tensor in tensors.items()}
        with _in_one_line(self.out):
            save_file(tensors, self._partial / _file(layer))

    def finish(self, model: ModelConfig, about: dict[str, Any]) -> None:
        """Write calibration.json and give the folder its name. about: what else it is to say."""
        with _in_one_line(self.out):
            for path in self._partial.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            document = {"version": VERSION, **about, "model": typed.plain(model), "checksums": self._checksums}
            write_json(self._partial / FILE, document)
            os.rename(self._partial, self.out)
            sync_folder(self.out.parent)


class Calibrated:
    """The INT8 weights in a folder. Raises ValueError, one line, where it is none, is damaged or of another version.

    model: the INT8 model. names: of its INT8 weights. shapes: of all its parameters.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / FILE
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no calibrated weights (no {FILE})")
        try:
            document = read_json(path)
            if document["version"] != VERSION:
                raise ValueError(f"it has version {document['version']!r}")
            self.model: ModelConfig = typed.build(ModelConfig, document["model"], "model")
            self._checksums, self.fingerprint = dict(document["checksums"]), document["fingerprint"]
            self.names = int8_names(self.model)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is none of this version's ({reason}); calibrate again") from None
        self.shapes = {row.name: row.shape for row in table(self.model)}

    def check(self, model: ModelConfig, reader: GlobalReader) -> None:
        """Raise ValueError unless these are INT8 weights of `model` and of the very weights that reader has."""
        ours = int8_model(model, self.model.spiking)
        if replace(ours, max_positions=self.model.max_positions) != self.model:
            raise ValueError(f"{self.folder} was calibrated of another model than this; calibrate again")
        if fingerprint_of(MergedGates(reader, model), self.model) != self.fingerprint:
            raise ValueError(f"{self.folder} was calibrated of other weights than this checkpoint's; calibrate again")

    def get(self, name: str) -> tuple[Tensor, Tensor]:
        """(int8 [F, D], scales [F, D / group, 1]) of a weight."""
        rows, columns = self.shapes[name]
        group = self.model.spiking.weight_group
        integers = self._read(name, name, torch.int8, (rows, columns))
        scales = self._read(name, name + SCALES, torch.float32, (rows, columns // group, 1))
        if not (scales.isfinite() & (scales > 0)).all():
            raise ValueError(f"{self.folder}: scales of {name} are not positive numbers; calibrate again")
        return integers, scales

    def _read(self, name: str, tensor_name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        _, layer = projection_of(name)
        path = self.folder / _file(layer)
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(tensor_name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot read {tensor_name} ({error}); calibrate again") from None
        if tensor.dtype is not dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {tensor_name} is {tensor.dtype} {list(tensor.shape)}; calibrate again")
        if checksum(tensor) != self._checksums.get(tensor_name):
            raise ValueError(f"{path}: {tensor_name} is not what was written; calibrate again")
        return tensor


class Int8Reader:
    """The tensors of the INT8 model: calibrated weights as integers times scales, all others as `reader` has them.

    int8_names: the weights that are calibrated.
    """

    def __init__(self, reader: GlobalReader, model: ModelConfig, calibrated: Calibrated):
        """reader, model: float, as they were calibrated."""
        self._reader, self._calibrated = MergedGates(reader, model), calibrated
        self.int8_names = frozenset(calibrated.names)

    def get(self, name: str) -> Tensor:
        """See GlobalReader."""
        return dequantize(*self._calibrated.get(name)) if name in self.int8_names else self._reader.get(name)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """(int8 [F, D], scales [F, D / group, 1]) of a calibrated weight."""
        return self._calibrated.get(name)

    def integers(self, name: str) -> Tensor:
        """int8 [F, D] of a calibrated weight."""
        return self._calibrated.get(name)[0]

    def scales(self, name: str) -> Tensor:
        """Scales [F, groups, 1] of a projection's weight; ones where the model leaves it out."""
        if name in self.int8_names:
            return self._calibrated.get(name)[1]
        rows, columns = self._calibrated.shapes[name]
        group = self._calibrated.model.spiking.weight_group
        return torch.ones(rows, columns // group if columns % group == 0 else 1, 1)


def fingerprint_of(reader: GlobalReader | MergedGates, model: ModelConfig) -> str:
    """A checksum of the weights that the INT8 model `model` rounds, and of the norms before them, as `reader` has them.

    The reader has one matrix for each gate: see MergedGates.
    """
    norms = (f"decoder.layers.{layer}.input_layernorm.weight" for layer in range(model.num_layers))
    total = 0
    for name in (*norms, *int8_names(model)):
        total = zlib.crc32(reader.get(name).float().contiguous().flatten().view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def checksum(tensor: Tensor) -> int:
    """Of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _file(layer: int) -> str:
    return f"layer_{layer:05d}.safetensors"


@contextmanager
def _in_one_line(out: Path) -> Iterator[None]:
    """Errors of the disk as one line that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"out={out} cannot be written ({error}); free space or choose another folder") from None
