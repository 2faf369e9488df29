"""The writer process: writes snapshots from shared memory to the disk while its training process goes on.

It is started once per rank, knows neither the model nor the GPU, and ends with the process that started it. Its parent
talks to it over a socket (sbtrain.checkpoint.writing); messages are carried out one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from sbtrain.checkpoint.files import read_json
from sbtrain.checkpoint.manifest import MANIFEST, drop, seal
from sbtrain.checkpoint.tensor_files import Item, Written, write_files, write_rest

_PR_SET_PDEATHSIG = 1
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_POLITE = 5
"""How much further behind the training process it stands in the queue for a core."""


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

    small: contents of files beside the tensors; metadata: the index without places; written: by all ranks.
    """

    token: int
    partial: Path
    final: Path
    small: dict[str, bytes | dict]
    metadata: Metadata
    written: list[Written]


@dataclass(frozen=True)
class Delete:
    """Delete these folders; what cannot be deleted stays."""

    token: int
    folders: list[Path]


@dataclass(frozen=True)
class Done:
    """Answer: to Write with what was written. problem: why not."""

    token: int
    seconds: float = 0.0
    written: Written | None = None
    problem: str | None = None


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
        written = write_files(message.folder, files.items, lambda item: _box(item, message.start, contents))
        return Done(message.token, time.monotonic() - began, written)
    except Exception as error:  # whatever it is, the training process must hear of it
        where = f"{Path(error.filename).name}: " if getattr(error, "filename", None) else ""
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        return Done(message.token, problem=f"{where}{reason}")


def _box(item: Item, start: int, contents: mmap.mmap) -> torch.Tensor:
    sizes = item.item.tensor_data.chunk.sizes
    where = dict(count=sizes.numel(), offset=start + item.start)
    return torch.frombuffer(contents, dtype=item.dtype, **where).view(sizes)  # its storage is that box alone


def _seal(message: Seal) -> None:
    """Small files, index, manifest, name."""
    partial, final = message.partial, message.final
    if not partial.is_dir() and _has(final, message.written):
        return  # a writer that died behind the rename had done it
    seal(partial, final, write_rest(partial, message.small, message.metadata, message.written))


def _has(final: Path, written: list[Written]) -> bool:
    try:
        files = read_json(final / MANIFEST)["files"]
    except FileNotFoundError:
        return False
    return all(files.get(name) == entry for each in written for name, entry in each.entries.items())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
