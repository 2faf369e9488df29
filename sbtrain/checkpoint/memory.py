"""SharedMemory: host memory that a training process and its writer both see, pinned where the state is on a GPU.

It is an anonymous file in memory (memfd), whose descriptor the writer inherits: it needs no room in /dev/shm, has no
name that could be left behind, and is gone when the last process that has it open ends, however that happens.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from sbtrain.config.schema import Recipe

NUM_SLOTS = 2
"""Snapshots that a rank has room for."""
ALIGNMENT = 4096
"""Bytes between possible starts of tensors: of a page, and more than any copy engine asks for."""
_POPULATE_WRITE = 23
_CHUNK_BYTES = 256 << 20
_NUM_THREADS = 8


class SharedMemory:
    """Grows, never shrinks. descriptor: what the writer maps."""

    def __init__(self):
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("snapshots")
        else:
            self.descriptor = os.dup(_unnamed_file())
        self.bytes: Tensor | None = None
        """The memory, uint8 [size]."""
        self._pinned = False

    @property
    def size(self) -> int:
        """Bytes there are."""
        return 0 if self.bytes is None else self.bytes.numel()

    def reserve(self, num_bytes: int, *, pin: bool) -> None:
        """Have num_bytes or more, every page of it in place, so that no copy waits for the kernel.

        Raises OSError where the memory cannot be had, ValueError where the driver does not pin it.
        """
        if num_bytes <= self.size:
            return
        self._release()
        os.ftruncate(self.descriptor, num_bytes)
        self.bytes = torch.frombuffer(mmap.mmap(self.descriptor, num_bytes), dtype=torch.uint8)
        _touch(self.bytes)
        if pin:
            code = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), num_bytes, 0)
            if int(code) != 0:
                raise ValueError(
                    f"the driver does not pin {num_bytes / 1e9:.1f} GB of host memory ({code}); set "
                    "checkpoint.asynchronous=false"
                )
            self._pinned = True

    def close(self) -> None:
        """Give the memory back, as far as this process has it."""
        self._release()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _release(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
        self.bytes, self._pinned = None, False


def copy_into(memory: Tensor, sources: Iterable[Tensor], starts: list[int]) -> int:
    """Copy each tensor to its first byte in memory; bytes, all of which are there when this returns.

    Large copies one behind the other on the stream that computes the sources, and one wait at the end. The device is
    at work on the first ones while the last ones are looked up.
    """
    num_bytes, on_device = 0, False
    with torch.no_grad():
        for source, start in zip(sources, starts, strict=True):
            size = source.numel() * source.element_size()
            memory[start : start + size].view(source.dtype).copy_(source, non_blocking=True)
            num_bytes, on_device = num_bytes + size, on_device or source.is_cuda
    if on_device:
        torch.cuda.current_stream().synchronize()
    return num_bytes


def place(sizes: list[int]) -> tuple[list[int], int]:
    """First bytes of things of these sizes, one behind the other, and the bytes of all."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def check_host(recipe: Recipe, num_bytes: int) -> None:
    """check_memory, for a checkpoint of so many bytes, as far as a recipe tells: cluster.gpus_per_node ranks a host."""
    if recipe.checkpoint.asynchronous:
        num_ranks = min(dist.get_world_size(), recipe.cluster.gpus_per_node)
        check_memory(NUM_SLOTS * num_ranks * num_bytes // dist.get_world_size(), num_ranks=num_ranks)


def check_memory(num_bytes: int, *, num_ranks: int) -> None:
    """Raise ValueError unless this host has so many bytes more for the snapshots of its ranks."""
    free = free_bytes()
    if num_bytes > free:
        raise ValueError(
            f"checkpoint.asynchronous=true needs {num_bytes / 1e9:.1f} GB of memory on host {platform.node()}, for "
            f"{NUM_SLOTS} snapshots of {num_ranks} ranks, and {free / 1e9:.1f} GB are free; free some, use more hosts "
            "or set checkpoint.asynchronous=false"
        )


def free_bytes() -> int:
    """Host memory that this process could still get: of the machine, and of its container."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()) + _cache_bytes(Path(limit)))
        except (OSError, ValueError):  # no such limit
            continue
    return max(free, 0)


def _cache_bytes(limit: Path) -> int:
    """Of the container's memory in use, what the kernel would drop: its cache of files."""
    for line in (limit.parent / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _touch(memory: Tensor) -> None:
    """Have the kernel give every page now, to several threads at once; older ones give them to the first copy."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None:
        return
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def touch(start: int) -> None:
        advise(memory.data_ptr() + start, min(_CHUNK_BYTES, memory.numel() - start), _POPULATE_WRITE)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(touch, range(0, memory.numel(), _CHUNK_BYTES)))


def _unnamed_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
