"""Reading a training checkpoint tensor by tensor, in one process, without a model and without process groups."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.safe_load import SafeReader


class GlobalReader(Protocol):
    """Unsharded tensors by our global names; CheckpointReader is one."""

    def get(self, name: str) -> Tensor: ...


class CheckpointReader:
    """The unsharded tensors of a torch.distributed.checkpoint folder by name, whatever layout wrote it.

    step_dir: run/checkpoints/step_N. Raises ValueError naming the folder or tensor when it is of another format,
    incomplete, or lacks a tensor.
    """

    def __init__(self, step_dir: str | Path):
        self.folder = Path(step_dir)
        if not (self.folder / ".metadata").is_file():
            raise ValueError(
                f"{self.folder} is not a finished torch.distributed.checkpoint (no .metadata); "
                "give a folder checkpoints/step_N of a run"
            )
        try:
            self._storage = SafeReader(self.folder)
            entries = self._storage.read_metadata().state_dict_metadata
        except (pickle.UnpicklingError, OSError) as error:
            raise ValueError(f"{self.folder} cannot be read ({error}); use another checkpoint") from None
        self._tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def names(self) -> list[str]:
        """All tensor names, sorted; the optimizer's are among them."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Unsharded shape, from the metadata alone."""
        return tuple(self._entry(name).size)

    def get(self, name: str) -> Tensor:
        """The unsharded tensor, in its own dtype, on the CPU."""
        entry = self._entry(name)
        try:
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load({name: tensor}, storage_reader=self._storage, no_dist=True)
        except (dcp.api.CheckpointException, RuntimeError, OSError, EOFError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.folder}: cannot read tensor {name} ({reason}); use another checkpoint") from None
        return tensor

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise ValueError(f"{self.folder} holds no tensor {name}; was it written by another model or recipe?")
        return self._tensors[name]
