"""Writing safetensors one tensor at a time: the header first, because all shapes are known, then the bytes.

safetensors' own save needs every tensor of a file in memory; an export should need one.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sbtrain.convert.hf import INDEX, SINGLE, HFCheckpoint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass
class _Shard:
    """One file to come: its name and the tensors it will hold, in order."""

    file: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    size_bytes: int = 0


class ShardWriter:
    """Writes tensors, in the announced order, into as many files as they need.

    folder: exists. shapes: every tensor to come. dtype: what they become, but for those in `wide`, which become fp32.
    max_shard_bytes: no file holds more, unless one tensor alone does. Use: append() for every tensor, then close();
    check() reads all back.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        max_shard_bytes: int,
        wide: frozenset[str] = frozenset(),
    ):
        self._folder = folder
        self._dtypes = {name: torch.float32 if name in wide else dtype for name in shapes}
        self._shards = _plan(shapes, self._dtypes, max_shard_bytes=max_shard_bytes)
        self._order = [(shard, name) for shard in self._shards for name in shard.shapes]
        self._file = None
        self._checksums: dict[str, int] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.size_bytes for shard in self._shards)

    def append(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, converted to its dtype here."""
        shard, expected = self._order[len(self._checksums)]
        assert name == expected and tuple(tensor.shape) == shard.shapes[name], (name, expected, tensor.shape)
        if name == next(iter(shard.shapes)):
            self._open(shard)
        data = _bytes_of(tensor.to(self._dtypes[name]))
        self._file.write(data)
        self._checksums[name] = zlib.crc32(data)

    def close(self) -> None:
        """Finish the last file and write the index if there are several."""
        assert len(self._checksums) == len(self._order), "tensors are missing"
        self._close_file()
        if len(self._shards) > 1:
            weight_map = {name: shard.file for shard, name in self._order}
            index = {"metadata": {"total_size": self.size_bytes}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def check(self) -> None:
        """Read every tensor back and compare it with what was given. Raises ValueError naming one that differs."""
        written = HFCheckpoint(self._folder)
        assert sorted(self._checksums) == written.names()
        for name, checksum in self._checksums.items():
            tensor = written.get(name)
            if tensor.dtype != self._dtypes[name] or zlib.crc32(_bytes_of(tensor)) != checksum:
                raise ValueError(f"export: tensor {name} reads back differently from {self._folder}; check the disk")

    def _open(self, shard: _Shard) -> None:
        self._close_file()
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard.shapes.items():
            dtype = self._dtypes[name]
            start, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._file = (self._folder / shard.file).open("wb")
        self._file.write(struct.pack("<Q", len(raw)) + raw)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _plan(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], *, max_shard_bytes: int) -> list[_Shard]:
    shards = [_Shard("")]
    for name, shape in shapes.items():
        size_bytes = prod(shape) * dtypes[name].itemsize
        if shards[-1].shapes and shards[-1].size_bytes + size_bytes > max_shard_bytes:
            shards.append(_Shard(""))
        shards[-1].shapes[name] = shape
        shards[-1].size_bytes += size_bytes
    for number, shard in enumerate(shards, start=1):
        shard.file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
