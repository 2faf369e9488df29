"""Our own exports read back: config.json to a ModelConfig, tensors to parameters.

All formats of sbtrain.convert.export, hence the folder format of the released SpikingBrain-7B as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sbtrain.config.export_shape import MODEL_TYPES, model_of_export
from sbtrain.config.hf_shape import read_config
from sbtrain.config.model_schema import ModelConfig
from sbtrain.convert.hf import HFCheckpoint
from sbtrain.convert.mapping import WHOLE, Mapping, Part
from sbtrain.convert.names import exported_name
from sbtrain.convert.weights import table

__all__ = ["MODEL_TYPES", "check_exported", "copy_exported", "fill_exported", "read_model"]


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
    reader = _opened(path, rows.values())
    for name, parameter in parameters.items():
        rows[name].copy_into(parameter, reader, part)


def check_exported(path: str | Path, rows: list[Mapping]) -> None:
    """Raise what `copy_exported` would raise about the folder. Reads headers alone."""
    reader = _opened(path, rows)
    for row in rows:
        row.check(reader)


def _opened(path: str | Path, rows) -> _Renamed:
    reader = _Renamed(path)
    wanted = {reader.name_of(source.name) for row in rows for source in row.sources}
    unused = sorted(set(reader.checkpoint.names()) - wanted)
    if unused:
        raise ValueError(
            f"{path} holds tensor {unused[0]}, which its config.json gives no place ({len(unused)} unused); "
            "export the model again"
        )
    return reader


class _Renamed:
    """Exported tensors under the names of the tables."""

    def __init__(self, path: str | Path):
        self.checkpoint = HFCheckpoint(path)
        self.model_type = read_config(path)["model_type"]

    def name_of(self, name: str) -> str:
        """The tensor's name in the folder."""
        return exported_name(name, self.model_type)

    def shape(self, name: str) -> tuple[int, ...]:
        """See HFCheckpoint."""
        return self.checkpoint.shape(self.name_of(name))

    def get(self, name: str) -> Tensor:
        """See HFCheckpoint."""
        return self.checkpoint.get(self.name_of(name))

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """See HFCheckpoint."""
        return self.checkpoint.get_slice(self.name_of(name), dim, start, stop)
