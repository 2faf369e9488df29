"""The writer process: writes snapshots from shared memory to the disk while its training process goes on.

It is started once per rank, knows neither the model nor the GPU, and ends with the process that started it. Its parent
talks to it over a socket (sbtrain.checkpoint.writing); messages are carried out one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import queue
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from sbtrain.checkpoint.files import read_json, write_json
from sbtrain.checkpoint.manifest import MANIFEST, Checksum, drop, measure, seal

_PR_SET_PDEATHSIG = 1
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_POLITE = 5
"""How much further behind the training process it stands in the queue for a core."""


@dataclass(frozen=True)
class Item:
    """One box in shared memory, start in bytes from the beginning of its slot; or content, the same always."""

    item: WriteItem
    dtype: torch.dtype | None = None
    start: int = 0
    content: bytes | None = None


@dataclass(frozen=True)
class Files:
    """What a rank writes of every snapshot: file name -> boxes. memory_bytes: of the shared memory."""

    items: dict[str, list[Item]]
    memory_bytes: int


@dataclass(frozen=True)
class Write:
    """Write the snapshot that begins at that byte of the shared memory into a folder, which may not exist yet."""

    token: int
    folder: Path
    start: int


@dataclass(frozen=True)
class Seal:
    """Make a checkpoint of a folder in which all ranks have written.

    small: contents of files beside the tensors; metadata: the index without places; results, entries: of all ranks.
    """

    token: int
    partial: Path
    final: Path
    small: dict[str, bytes | dict]
    metadata: Metadata
    results: list[list[WriteResult]]
    entries: dict[str, dict]


@dataclass(frozen=True)
class Delete:
    """Delete these folders; what cannot be deleted stays."""

    token: int
    folders: list[Path]


@dataclass(frozen=True)
class Done:
    """Answer: to Write with results (where each box lies) and entries (of the manifest). problem: why not."""

    token: int
    seconds: float = 0.0
    results: tuple[WriteResult, ...] = ()
    entries: dict[str, dict] | None = None
    problem: str | None = None


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


def main(descriptor: int, memory: int, parent: int) -> None:
    """Carry out what comes over the socket `descriptor` until it is closed. Entered with signals blocked."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before the kernel was asked
        return
    os.nice(_POLITE)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    pipe, messages = Connection(descriptor), queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, messages), daemon=True).start()
    files, contents = None, None
    while (message := messages.get()) is not None:
        if isinstance(message, Files):
            files, contents = message, mmap.mmap(memory, message.memory_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        elif isinstance(message, Delete):
            with contextlib.suppress(OSError):
                drop(message.folders)
            pipe.send(Done(message.token))
        else:
            pipe.send(_answer(message, files, contents))


def _listen(pipe: Connection, messages: queue.SimpleQueue) -> None:
    """Take messages off the socket, so that the sender never waits; end with it."""
    try:
        while True:
            messages.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _answer(message: Write | Seal, files: Files, contents: mmap.mmap) -> Done:
    began = time.monotonic()
    try:
        if isinstance(message, Seal):
            _seal(message)
            return Done(message.token, time.monotonic() - began)
        message.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max(len(files.items), 1)) as pool:
            written = [pool.submit(_write_file, message, name, items, contents) for name, items in files.items.items()]
            results = [result for each in written for result in each.result()[0]]
        entries = {name: each.result()[1] for name, each in zip(files.items, written)}
        return Done(message.token, time.monotonic() - began, tuple(results), entries)
    except Exception as error:  # whatever it is, the training process must hear of it
        where = f"{Path(error.filename).name}: " if getattr(error, "filename", None) else ""
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        return Done(message.token, problem=f"{where}{reason}")


def _write_file(message: Write, name: str, items: list[Item], contents: mmap.mmap) -> tuple[list, dict]:
    """One file of a rank, in torch's format of distributed checkpoints. It is on the disk when this returns."""
    path, results, transforms = message.folder / name, [], _StorageWriterTransforms()
    with open(path, "wb", buffering=0) as file:
        stream = _Checked(file)
        try:
            for each in items:
                content, form = _content(each, message.start, contents), SerializationFormat.TORCH_SAVE
                results.append(_write_item(transforms, stream, content, each.item, name, form))
        except Exception as error:
            raise stream.error or error from None
        os.fsync(file.fileno())
    return results, {"bytes": stream.checksum.num_bytes, "crc32": stream.checksum.text}


def _content(item: Item, start: int, contents: mmap.mmap) -> torch.Tensor | io.BytesIO:
    if item.content is not None:
        return io.BytesIO(item.content)
    sizes = item.item.tensor_data.chunk.sizes
    where = dict(count=sizes.numel(), offset=start + item.start)
    return torch.frombuffer(contents, dtype=item.dtype, **where).view(sizes)  # its storage is that box alone


def _seal(message: Seal) -> None:
    """Small files, index, manifest, name."""
    partial = message.partial
    if not partial.is_dir() and _has(message.final, message.entries):
        return  # a writer that died behind the rename had done it
    for name, content in message.small.items():
        if isinstance(content, bytes):
            (partial / name).write_bytes(content)
        else:
            write_json(partial / name, content)
    FileSystemWriter(partial).finish(message.metadata, message.results)
    entries = {**message.entries, **measure(partial, [".metadata", *message.small])}
    seal(partial, message.final, entries)


def _has(final: Path, entries: dict[str, dict]) -> bool:
    try:
        files = read_json(final / MANIFEST)["files"]
    except FileNotFoundError:
        return False
    return all(files.get(name) == entry for name, entry in entries.items())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
