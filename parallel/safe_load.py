"""Loading a checkpoint without running anything that is in it, and without leaving its folder.

Python's pickle calls whatever a file names. Tensors and plain values go through torch's weights_only loader; the index
of a torch.distributed.checkpoint (`.metadata`) is a pickle of a few known classes, and only those are made.
`parallel.mcore` puts these functions in the place of megatron's own, which call anything.
"""

from __future__ import annotations

import io
import os
import pickle
import stat
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

_CHECKPOINT = "torch.distributed.checkpoint"
_NAMES = {
    f"{_CHECKPOINT}.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_CHECKPOINT}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "strided", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
_KNOWN = {(module, name) for module, names in _NAMES.items() for name in names}


class _Untrusted(pickle.UnpicklingError):
    """What no checkpoint of ours has, and somebody may have put there."""


class _IndexUnpickler(pickle.Unpickler):
    """Makes the classes of a checkpoint's index, and nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _KNOWN:
            raise _Untrusted(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)

    def persistent_load(self, pid):
        raise _Untrusted("it names objects outside of itself")


class SafeReader(FileSystemReader):
    """Reads a checkpoint folder as torch's own reader does; the index is read once, by _IndexUnpickler."""

    def __init__(self, folder: str | os.PathLike):
        super().__init__(folder)
        self._folder, self._index = Path(folder), None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """The index. Raises pickle.UnpicklingError, in one line, for anything else or for files outside the folder."""
        if self._index is None:
            self._index = read_index(self._folder)
            self._index.storage_meta = self._index.storage_meta or StorageMeta()
            self._index.storage_meta.load_id = self.load_id
        return self._index

    def read_parts(self, items: Iterable[ReadItem], put: Callable[[ReadItem, Tensor], None]) -> None:
        """put(item, part) for what each item asks for of a stored tensor, on the CPU, in the order of the files.

        A stored box is read once, however many items want a part of it, and is gone before the next one. Raises what
        reading and torch.load raise.
        """
        boxes: dict[MetadataIndex, list[ReadItem]] = {}
        for item in items:
            boxes.setdefault(item.storage_index, []).append(item)
        places = self.read_metadata().storage_data
        in_order = sorted(boxes, key=lambda index: (places[index].relative_path, places[index].offset))
        for name, indices in groupby(in_order, key=lambda index: places[index].relative_path):
            with open(self._folder / name, "rb") as file:
                for index in indices:
                    stored = torch.load(self._slice_file(file, places[index]), map_location="cpu", weights_only=True)
                    for item in boxes[index]:
                        put(item, narrow(stored, item.storage_offsets, item.lengths))
                    del stored


def narrow(x: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The box of x that begins at offsets, a view."""
    for dim, (first, size) in enumerate(zip(offsets, sizes)):
        x = x.narrow(dim, first, size)
    return x


def read_index(folder: Path) -> Metadata:
    """What `.metadata` says of the tensors of a checkpoint and where they lie.

    Raises pickle.UnpicklingError, in one line, where it is damaged, would run code, or names files that are not whole
    or not in the folder; OSError where it cannot be read.
    """
    content = (folder / ".metadata").read_bytes()
    try:
        index = _IndexUnpickler(io.BytesIO(content)).load()
        kinds = (TensorStorageMetadata, BytesStorageMetadata)
        if not isinstance(index, Metadata) or not all(
            isinstance(name, str) and isinstance(entry, kinds) for name, entry in index.state_dict_metadata.items()
        ):
            raise _Untrusted("it holds no tensors")
        ends: dict[str, int] = {}
        for place in index.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
            if place.offset < 0 or place.length < 0:
                raise _Untrusted(f"it names bytes before the beginning of {place.relative_path!r}")
    except _Untrusted as error:
        raise pickle.UnpicklingError(f".metadata is not to be trusted: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no pickle can raise anything
        raise pickle.UnpicklingError(f".metadata is damaged ({type(error).__name__})") from None
    for name, end in ends.items():
        _check_file(folder, name, end)
    return index


def _check_file(folder: Path, name: str, num_bytes: int) -> None:
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise pickle.UnpicklingError(f".metadata is not to be trusted: it names {name!r}, outside of the folder")
    try:
        found = os.lstat(folder / name)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise pickle.UnpicklingError(f"{name} is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise pickle.UnpicklingError(f"{name} is no regular file")
    if found.st_size < num_bytes:
        raise pickle.UnpicklingError(f"{name} has {found.st_size} bytes, fewer than the {num_bytes} in use")


def open_reader(checkpoint_dir: str | os.PathLike, cache_metadata: bool = False) -> SafeReader:
    """The reader of a checkpoint folder; it always keeps the index."""
    return SafeReader(checkpoint_dir)


def load_bytes(planner, read_item, value: io.BytesIO) -> None:
    """Put an object beside the tensors in its place: plain values and tensors only."""
    loaded = torch.load(value, weights_only=True)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[read_item.dest_index.fqn], loaded)
    else:
        planner.state_dict[read_item.dest_index.fqn] = loaded


def load_common(strategy, checkpoint_dir: str | os.PathLike) -> dict:
    """read_common, as megatron calls it."""
    return read_common(checkpoint_dir)


def read_common(checkpoint_dir: str | os.PathLike) -> dict:
    """common.pt, what all ranks share: plain values and tensors only, whatever torch's defaults or variables say."""
    return torch.load(Path(checkpoint_dir) / "common.pt", map_location="cpu", weights_only=True)
