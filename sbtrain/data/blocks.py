"""Blocks: the tokens of a corpus on disk, and checksums that are compared before one of them is used.

PREFIX.crc has the CRC-32 of every 64 KiB of PREFIX.bin (uint32, little-endian), written when the corpus is made;
PREFIX.json has those of PREFIX.crc and PREFIX.idx. A read fetches the whole blocks that it touches into memory of its
own and compares them there: nothing is read ahead of need, a file that changes while a run goes on is noticed, and no
cut file ends the process, as it does where it is mapped.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

BLOCK_BYTES = 64 << 10
_CHUNK_BYTES = 16 << 20


class Sums:
    """The checksums of a file's blocks, from its bytes in order."""

    def __init__(self, block_bytes: int = BLOCK_BYTES):
        self._block_bytes, self._sums, self._filled, self._sum = block_bytes, [], 0, 0

    def add(self, data: bytes) -> None:
        """The next bytes, any number of them."""
        view = memoryview(data)
        while view:
            piece = view[: self._block_bytes - self._filled]
            self._sum, self._filled = zlib.crc32(piece, self._sum), self._filled + len(piece)
            view = view[len(piece) :]
            if self._filled == self._block_bytes:
                self._sums.append(self._sum)
                self._sum = self._filled = 0

    def table(self) -> np.ndarray:
        """uint32 [blocks], the last one perhaps shorter. Nothing may be added afterwards."""
        return np.array([*self._sums, *([self._sum] if self._filled else [])], dtype="<u4")


class Blocks:
    """Read access to a .bin file, block by block. Any thread may read."""

    def __init__(self, path: Path, *, num_bytes: int, sums: np.ndarray | None, block_bytes: int = BLOCK_BYTES):
        """num_bytes: of the file. sums: of its blocks; None: none are known, only its length is checked."""
        self._path, self._num_bytes, self._sums, self._block_bytes = path, num_bytes, sums, block_bytes
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (stays open until close())

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop). Raises ValueError naming the file where they are not what was written."""
        first, last = start, stop
        if self._sums is not None:
            first = start - start % self._block_bytes
            last = min(-(-stop // self._block_bytes) * self._block_bytes, self._num_bytes)
        raw = memoryview(self._fetch(first, last))
        if self._sums is not None:
            for offset in range(0, len(raw), self._block_bytes):
                block = (first + offset) // self._block_bytes
                if zlib.crc32(raw[offset : offset + self._block_bytes]) != self._sums[block]:
                    raise ValueError(
                        f"{self._path} is corrupt: bytes {first + offset} to "
                        f"{min(first + offset + self._block_bytes, self._num_bytes)} have not the checksum that was "
                        "written with them; copy the file again or rerun prepare_data"
                    )
        return raw[start - first : stop - first]

    def _fetch(self, start: int, stop: int) -> bytes:
        pieces = []
        while start < stop:
            try:
                piece = os.pread(self._file.fileno(), stop - start, start)
            except OSError as error:
                raise ValueError(f"{self._path}: {error.strerror or error}; copy the file again") from error
            if not piece:
                raise ValueError(
                    f"{self._path} is truncated: it ends at byte {start} of {self._num_bytes}; copy the file again or "
                    "rerun prepare_data"
                )
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        self._file.close()


def file_crc32(path: Path) -> str:
    """CRC-32 of a whole file, in eight hexadecimal digits. Raises OSError."""
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            total = zlib.crc32(chunk, total)
    return f"{total:08x}"


def write_sums(prefix: str | Path, sums: Sums) -> dict:
    """Write PREFIX.crc; returns what PREFIX.json keeps under `checksums`. PREFIX.idx must be there. Raises OSError."""
    path = Path(f"{prefix}.crc")
    partial = path.with_name(path.name + ".partial")
    sums.table().tofile(partial)
    os.replace(partial, path)
    return {"block_bytes": BLOCK_BYTES, "crc": file_crc32(path), "idx": file_crc32(Path(f"{prefix}.idx"))}


def read_sums(prefix: str, about: dict, *, num_bytes: int) -> np.ndarray | None:
    """The checksums of PREFIX.bin, of num_bytes; None where PREFIX.json knows of none. about: its content.

    Raises ValueError, one line with the file and the fix, where PREFIX.crc or PREFIX.idx are not what was written.
    """
    known = about.get("checksums")
    if known is None:
        return None
    fix = "copy it again or rerun prepare_data"
    block_bytes = known.get("block_bytes") if isinstance(known, dict) else None
    if not (isinstance(block_bytes, int) and block_bytes > 0):
        raise ValueError(f"{prefix}.json: checksums has no block_bytes; {fix}")
    for ending in ("crc", "idx"):
        path = Path(f"{prefix}.{ending}")
        if not path.is_file():
            raise ValueError(f"{path} is missing; {fix}")
        if file_crc32(path) != known.get(ending):
            raise ValueError(f"{path} is corrupt: it has not the checksum that {prefix}.json says; {fix}")
    table = np.fromfile(f"{prefix}.crc", dtype="<u4")
    if len(table) != -(-num_bytes // block_bytes):
        raise ValueError(f"{prefix}.crc has {len(table)} checksums, {prefix}.bin another number of blocks; {fix}")
    return table
