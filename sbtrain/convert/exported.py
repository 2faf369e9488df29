"""Our own exports read back: config.json to a ModelConfig, tensors to parameters.

All formats of sbtrain.convert.export, hence the folder formats of the released SpikingBrain-7B as well, float and INT8.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sbtrain.config.export_shape import MODEL_TYPES, has_int8_weights, model_of_export
from sbtrain.config.hf_shape import read_config
from sbtrain.config.model_schema import ModelConfig
from sbtrain.convert.hf import HFCheckpoint
from sbtrain.convert.mapping import WHOLE, Mapping, Part, Reader
from sbtrain.convert.names import exported_name, projection_of, scales_name
from sbtrain.convert.weights import table

__all__ = ["MODEL_TYPES", "check_exported", "copy_exported", "fill_exported", "opened", "read_model"]


def read_model(folder: str | Path) -> ModelConfig:
    """The configuration of an exported model. Raises ValueError, one line, naming the file and the key."""
    return model_of_export(read_config(folder), Path(folder) / "config.json")


@torch.no_grad()
def fill_exported(parameters: dict[str, Tensor], *, model: ModelConfig, path: str | Path) -> None:
    """Fill the parameters of an unsharded model (any float dtype, any device) by global name, tensor by tensor.

    Raises ValueError, one line, when a tensor is missing, unused or of another shape.
    """
    copy_exported(parameters, {row.name: row for row in table(model)}, path=path)


def copy_exported(
    parameters: dict[str, Tensor], rows: dict[str, Mapping], *, path: str | Path, part: Part = WHOLE
) -> None:
    """The same for one rank's parameters of a model with these mappings."""
    reader = opened(path, rows.values())
    for name, parameter in parameters.items():
        rows[name].copy_into(parameter, reader, part)


def check_exported(path: str | Path, rows: list[Mapping]) -> None:
    """Raise what `copy_exported` would raise about the folder. Reads headers alone."""
    reader = opened(path, rows)
    for row in rows:
        row.check(reader)


def opened(path: str | Path, rows: Iterable[Mapping]) -> Reader:
    """The folder's tensors under the names of the tables. Raises ValueError where it has some that rows do not."""
    rows = list(rows)
    reader = _Renamed(path)
    wanted = {name for row in rows for source in row.sources for name in reader.names_of(source.name)}
    unused = sorted(set(reader.checkpoint.names()) - wanted)
    if unused:
        raise ValueError(
            f"{path} holds tensor {unused[0]}, which its config.json gives no place ({len(unused)} unused); "
            "export the model again"
        )
    return reader


class _Renamed:
    """Exported tensors under the names of the tables.

    Of an INT8 model: the weights of projections as integers times scales, whatever float values stand for them.
    """

    def __init__(self, path: str | Path):
        self.checkpoint, config = HFCheckpoint(path), read_config(path)
        self.model_type, self._int8 = config["model_type"], has_int8_weights(config)
        self._spiking = read_model(path).spiking

    def name_of(self, name: str) -> str:
        """The tensor's name in the folder."""
        return exported_name(name, self.model_type)

    def names_of(self, name: str) -> list[str]:
        """That name and, of an INT8 model's projection, that of its scales."""
        has_scales = self._int8 and projection_of(name) is not None
        return [self.name_of(name), *([scales_name(self.name_of(name))] if has_scales else [])]

    def shape(self, name: str) -> tuple[int, ...]:
        """See HFCheckpoint. Raises ValueError where scales are missing or do not fit."""
        shape = self.checkpoint.shape(self.name_of(name))
        if self._is_rounded(name) and len(shape) == 2:
            self._check_scales(scales_name(self.name_of(name)), shape)
        return shape

    def get(self, name: str) -> Tensor:
        """See HFCheckpoint."""
        weight = self.checkpoint.get(self.name_of(name))
        return self._rounded(weight, self._scales(name)) if self._is_rounded(name) else weight

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """See HFCheckpoint."""
        if not self._is_rounded(name) or dim == 0:
            weight = self.checkpoint.get_slice(self.name_of(name), dim, start, stop)
            return self._rounded(weight, self._scales(name)[start:stop]) if self._is_rounded(name) else weight
        return self.get(name).narrow(dim, start, stop - start)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """(int8 [F, D], scales fp32 [F, D / group, 1]) of a rounded weight. Raises ValueError where it is none."""
        weight, scales = self.checkpoint.get(self.name_of(name)).float(), self._scales(name)
        integers = weight.unflatten(1, (scales.shape[1], -1)).div_(scales).round_().flatten(1)
        if not ((integers >= -128) & (integers <= 127)).all():
            raise ValueError(
                f"{self.checkpoint.folder}: {self.name_of(name)} over its scales leaves int8; fetch or export the "
                "model again"
            )
        return integers.to(torch.int8), scales

    def _is_rounded(self, name: str) -> bool:
        where = projection_of(name) if self._int8 else None
        return where is not None and self._spiking.spikes(*where)

    def _check_scales(self, name: str, shape: tuple[int, ...]) -> None:
        rows, columns = shape
        wanted, group = self.checkpoint.shape(name), self._spiking.weight_group
        if columns % group or wanted != (rows, columns // group, 1):
            raise ValueError(
                f"{self.checkpoint.folder}: {name} is {list(wanted)}, a weight of {list(shape)} in groups of {group} "
                f"needs {[rows, columns // group, 1]}; export the model again"
            )

    def _scales(self, name: str) -> Tensor:
        """Raises ValueError naming scales that are no scales."""
        scales = self.checkpoint.get(scales_name(self.name_of(name))).float()
        if not (scales.isfinite() & (scales > 0)).all():
            raise ValueError(
                f"{self.checkpoint.folder}: {scales_name(self.name_of(name))} holds values that are not positive "
                "numbers; fetch or export the model again"
            )
        return scales

    @staticmethod
    def _rounded(weight: Tensor, scales: Tensor) -> Tensor:
        grouped = weight.float().unflatten(1, (scales.shape[1], -1))
        return ((grouped / scales).round_() * scales).flatten(1)
