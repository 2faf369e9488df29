"""A Hugging Face folder, of a source family or exported by us, read like a training checkpoint: by our global names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sbtrain.config.model_schema import ModelConfig
from sbtrain.convert.exported import opened
from sbtrain.convert.hf import HFCheckpoint
from sbtrain.convert.mapping import Mapping
from sbtrain.convert.start import starts_from_export
from sbtrain.convert.weights import check_names, inherited, table


class FolderReader:
    """The unsharded parameters of a folder's model, one at a time.

    model: what the folder's config.json says. Raises ValueError, one line, where tensors are missing or left over.
    """

    def __init__(self, folder: str | Path, model: ModelConfig):
        exported = starts_from_export(str(folder))
        rows = table(model) if exported else inherited(model)
        self._rows: dict[str, Mapping] = {row.name: row for row in rows}
        self._reader = opened(folder, rows) if exported else HFCheckpoint(folder)
        if not exported:
            check_names(self._reader.names(), rows, model=model, where=str(folder))

    @torch.no_grad()
    def get(self, name: str) -> Tensor:
        """The parameter in fp32, on the CPU. Raises ValueError where the folder's tensors have other shapes."""
        row = self._rows[name]
        tensor = torch.empty(row.shape)
        row.copy_into(tensor, self._reader)
        return tensor
