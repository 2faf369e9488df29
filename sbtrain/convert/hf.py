"""Reading a Hugging Face folder: safetensors, one file or sharded with an index, tensor by tensor.

Headers are checked against the file sizes before anything is used, so a download that stopped halfway is a clear line
and not a crash in the middle of a start. No tensor is kept, and a slice touches its own bytes alone.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies."""

    file: Path
    shape: tuple[int, ...]


class HFCheckpoint:
    """The tensors of a folder by name.

    folder: holds model.safetensors, or model.safetensors.index.json and the shards it names.
    Raises ValueError, naming the file or tensor, when a file is missing, truncated or not safetensors, when a tensor
    of the index is in no shard, and when a tensor is not fp64, fp32, fp16 or bf16.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"start.path: {self.folder} is not a folder; give a downloaded Hugging Face model")
        self._index = self.folder / INDEX
        self._entries = self._read_index() if self._index.exists() else self._read_single()

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._entry(name).shape

    def get(self, name: str) -> Tensor:
        """The whole tensor, in its own dtype, on the CPU (mapped from the file; copy it before writing to it)."""
        with safe_open(self._entry(name).file, framework="pt") as file:
            return file.get_tensor(name)

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 along dim of a tensor, without reading the rest of the file."""
        with safe_open(self._entry(name).file, framework="pt") as file:
            part = file.get_slice(name)
            return part[(slice(None),) * dim + (slice(start, stop),)]

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            where = self._index if self._index.exists() else self.folder / SINGLE
            raise ValueError(f"{where} holds no tensor {name}; the model in the recipe expects it, check start.path")
        return self._entries[name]

    def _read_single(self) -> dict[str, _Entry]:
        path = self.folder / SINGLE
        if not path.is_file():
            raise ValueError(
                f"start.path: {self.folder} holds neither {SINGLE} nor {INDEX}; only safetensors are read, "
                "convert other weights with save_pretrained"
            )
        return _read_header(path)

    def _read_index(self) -> dict[str, _Entry]:
        try:
            files = dict(json.loads(self._index.read_text())["weight_map"])
            if not all(isinstance(file, str) for file in files.values()):
                raise ValueError("names of files are text")
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self._index} is not a safetensors index; download it again") from None
        headers = {}
        for file in sorted(set(files.values())):
            if not (self.folder / file).is_file():
                raise ValueError(f"{self.folder / file} is missing but {INDEX} names it; download this shard")
            headers[file] = _read_header(self.folder / file)
        for name, file in files.items():
            if name not in headers[file]:
                raise ValueError(f"{self._index} says that {file} holds tensor {name}, and it does not; download both")
        return {name: headers[file][name] for name, file in files.items()}


def _read_header(path: Path) -> dict[str, _Entry]:
    """Names and shapes of one safetensors file, after checking that the file is as long as its header says."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if header_bytes < 2 or 8 + header_bytes > size_bytes:
            raise ValueError(f"{path} is truncated or not safetensors ({size_bytes} bytes); download it again")
        raw = file.read(header_bytes)
    try:
        header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        end_bytes = 8 + header_bytes + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        entries = {name: _Entry(path, tuple(entry["shape"])) for name, entry in header.items()}
        dtypes = {name: entry["dtype"] for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{path} has a corrupt safetensors header; download it again") from None
    if end_bytes != size_bytes:
        raise ValueError(
            f"{path} is truncated or corrupt: its header promises {end_bytes} bytes, the file has {size_bytes}; "
            "download it again"
        )
    for name, dtype in dtypes.items():
        if dtype not in _FLOATS:
            raise ValueError(
                f"{path}: tensor {name} has dtype {dtype}, expected one of {', '.join(_FLOATS)}; "
                "start from the unquantized checkpoint"
            )
    return entries
