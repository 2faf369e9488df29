"""A Hugging Face folder, of a source family or exported by us, read like a training checkpoint: by our global names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sbtrain.config.export_shape import has_int8_weights
from sbtrain.config.hf_shape import read_config
from sbtrain.config.model_schema import ModelConfig
from sbtrain.convert.calibrated import int8_names
from sbtrain.convert.exported import opened
from sbtrain.convert.hf import HFCheckpoint
from sbtrain.convert.mapping import Mapping, check_shape
from sbtrain.convert.start import starts_from_export
from sbtrain.convert.weights import check_names, inherited, table


class FolderReader:
    """The unsharded parameters of a folder's model, one at a time.

    model: what the folder's config.json says. int8_names: weights that it has as INT8 with scales, of a W8ASpike
    folder. Raises ValueError, one line, where tensors are missing or left over.
    """

    def __init__(self, folder: str | Path, model: ModelConfig):
        exported = starts_from_export(str(folder))
        rows = table(model) if exported else inherited(model)
        self._rows: dict[str, Mapping] = {row.name: row for row in rows}
        self._reader = opened(folder, rows) if exported else HFCheckpoint(folder)
        if not exported:
            check_names(self._reader.names(), rows, model=model, where=str(folder))
        self.int8_names = frozenset(int8_names(model) if has_int8_weights(read_config(folder)) else ())
        self._group = model.spiking.weight_group

    @torch.no_grad()
    def get(self, name: str) -> Tensor:
        """The parameter in fp32, on the CPU. Raises ValueError where the folder's tensors have other shapes."""
        row = self._rows[name]
        tensor = torch.empty(row.shape)
        row.copy_into(tensor, self._reader)
        return tensor

    @torch.no_grad()
    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """(int8 [F, D], scales fp32 [F, D / group, 1]) of one of int8_names. Raises ValueError as `get` does."""
        row = self._rows[name]
        num_rows, columns = row.shape
        pair = torch.empty(row.shape, dtype=torch.int8), torch.empty(num_rows, columns // self._group, 1)
        for source, *views in zip(row.sources, *(row.views(tensor) for tensor in pair)):
            check_shape(source, self._reader)
            for view, tensor in zip(views, self._reader.pair(source.name)):
                view.copy_(tensor.view(view.shape))
        return pair
