"""The files of a checkpoint: tensors in torch's distributed format, with checksums taken while they are written.

No model, no process group, no GPU is needed here: the writer process of a rank and a rank that waits for its save call
the same functions.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from sbtrain.checkpoint.files import naming, write_json
from sbtrain.checkpoint.manifest import Checksum, measure


@dataclass(frozen=True)
class Item:
    """One box of a rank, start in bytes from the beginning of its share; or content, the same always."""

    item: WriteItem
    dtype: torch.dtype | None = None
    start: int = 0
    content: bytes | None = None


@dataclass(frozen=True)
class Written:
    """By a rank: where each box lies, and what the manifest says of its files."""

    results: tuple[WriteResult, ...] = ()
    entries: dict[str, dict] | None = None


class _Checked(io.RawIOBase):
    """A file that is written from its beginning to its end, its checksum, and why it could not be."""

    def __init__(self, file):
        self._file, self.checksum, self.error = file, Checksum(), None

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        view = memoryview(content).cast("B")
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self.error = error  # torch.save makes something else of it
            raise
        self.checksum.add(view)
        return len(view)

    def tell(self) -> int:
        return self.checksum.num_bytes


def write_files(folder: Path, files: dict[str, list[Item]], read: Callable[[Item], Tensor]) -> Written:
    """Write a rank's files, in a thread each. They are on the disk when this returns. Raises OSError naming the file.

    read(item): the box on the CPU, in its shape, with memory of its own or of that box alone.
    """
    with ThreadPoolExecutor(max(len(files), 1)) as pool:
        written = [pool.submit(_write_file, folder / name, items, read) for name, items in files.items()]
    results = tuple(result for each in written for result in each.result()[0])
    return Written(results, {name: each.result()[1] for name, each in zip(files, written)})


def _write_file(path: Path, items: list[Item], read: Callable[[Item], Tensor]) -> tuple[list, dict]:
    results, transforms, form = [], _StorageWriterTransforms(), SerializationFormat.TORCH_SAVE
    with naming(path), open(path, "wb", buffering=0) as file:
        stream = _Checked(file)
        try:
            for each in items:
                content = read(each) if each.content is None else io.BytesIO(each.content)
                results.append(_write_item(transforms, stream, content, each.item, path.name, form))
        except Exception as error:
            raise (stream.error or error) from None
        os.fsync(file.fileno())
    return results, {"bytes": stream.checksum.num_bytes, "crc32": stream.checksum.text}


def write_rest(
    folder: Path, small: dict[str, bytes | dict], metadata: Metadata, written: Sequence[Written]
) -> dict[str, dict]:
    """Write the index and the small files beside what all ranks have written; what the manifest says of all files.

    small: contents by name, bytes or JSON. metadata: the index without places. Raises OSError naming the file.
    """
    for name, content in small.items():
        if isinstance(content, bytes):
            with naming(folder / name):
                (folder / name).write_bytes(content)
        else:
            write_json(folder / name, content)
    with naming(folder / ".metadata"):
        FileSystemWriter(folder).finish(metadata, [list(each.results) for each in written])
    entries = {name: entry for each in written for name, entry in each.entries.items()}
    return {**entries, **measure(folder, [".metadata", *small])}
