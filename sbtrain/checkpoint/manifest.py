"""manifest.json: the size and checksum of every file of a checkpoint. A folder whose manifest holds is a checkpoint.

All of this works on a folder alone: no model, no process group, no ledger. The checksum is zlib's CRC-32 over blocks,
which threads compute side by side: it finds what disks and cut copies do to a file, not what somebody does on purpose.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import stat
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sbtrain.checkpoint.files import read_json, sync_folder, write_json

MANIFEST = "manifest.json"
FILES = ("state.json", "metadata.json", "common.pt", ".metadata")
"""What every checkpoint has beside its tensors."""
KIND = "crc32 of the crc32s of 16 MiB blocks"
GONE = "it is gone"
"""The fault of a checkpoint whose folder is not there."""
LAG_S = 90.0
"""How long a host may see a folder as it was before: network file systems remember for a minute at most."""
LOOK_S = 0.5
ONE_FOLDER = "run_dir must be one folder that all hosts share"
_BLOCK_BYTES = 16 << 20
_NUM_THREADS = 4
_MOST_MANIFEST_BYTES = 64 << 20
_SUM = re.compile(r"[0-9a-f]{8}")
_OF_THE_FILES = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
"""Errors that say something of the files, whichever host reads them."""


class Unreadable(ValueError):
    """This host cannot read a file, which says nothing of the checkpoint: its mount, its rights or its network fail."""


class Checksum:
    """The same checksum of a file that is being written. num_bytes: so far."""

    def __init__(self):
        self.num_bytes, self._sums, self._open = 0, [], 0

    def add(self, content: memoryview) -> None:
        """What is written next."""
        while len(content):
            room = _BLOCK_BYTES - self.num_bytes % _BLOCK_BYTES
            part, content = content[:room], content[room:]
            self._open = zlib.crc32(part, self._open)
            self.num_bytes += len(part)
            if self.num_bytes % _BLOCK_BYTES == 0:
                self._sums.append(self._open)
                self._open = 0

    @property
    def text(self) -> str:
        """As a manifest has it."""
        sums = self._sums + ([self._open] if self.num_bytes % _BLOCK_BYTES else [])
        return _combined(sums)


def measure(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """What the manifest says of these files: `bytes` and `crc32`. They are on the disk when this returns.

    Raises OSError where one cannot be read or the disk does not take it.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return {name: _measure_file(folder / name, pool, sync=True) for name in names}


def seal(partial: Path, final: Path, entries: dict[str, dict]) -> None:
    """Write the manifest of a folder whose files are all written, then give the folder its name. Raises OSError.

    entries: what `measure` says of all files. Whatever had the name is gone; after a crash there is no folder of that
    name or a whole one. Raises ValueError where this host does not see what others say they have written there.
    """
    _wait_for(partial, entries)
    write_json(partial / MANIFEST, {"checksum": KIND, "files": dict(sorted(entries.items()))})
    if final.exists():
        put_away(final)
    partial.rename(final)
    sync_folder(final.parent)


def _wait_for(folder: Path, entries: dict[str, dict]) -> None:
    """Return when all files are there in their sizes. Other hosts have written some, and may have another folder."""
    end = time.monotonic() + LAG_S
    for name, entry in entries.items():
        while (found := _size_of(folder / name)) != entry["bytes"]:
            if time.monotonic() >= end:
                seen = "does not see it" if found is None else f"sees {found} bytes of its {entry['bytes']}"
                raise ValueError(
                    f"{name}: host {platform.node()} {seen}, {LAG_S:.0f} s after it was written: {ONE_FOLDER}"
                )
            time.sleep(LOOK_S)


def _size_of(path: Path) -> int | None:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return None


def put_away(folder: Path) -> None:
    """Delete a checkpoint. Where that is interrupted, what is left is no checkpoint by its name."""
    aside = folder.with_name(f"{folder.name}.gone.partial")
    delete(aside)
    folder.rename(aside)
    delete(aside)


def drop(folders: Iterable[Path]) -> None:
    """Delete checkpoints, and what is left of others (step_N.partial and the like). Raises OSError."""
    for folder in folders:
        delete(folder) if "." in folder.name else put_away(folder)


def delete(folder: Path) -> None:
    """Delete a folder, or a link to one. What cannot be deleted stays."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def fault(folder: Path, *, deep: bool = True, rank: int = 0, num_ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where it is as it was written.

    deep: read the files too, this rank's share of them by size; otherwise only their sizes are compared. No content
    is interpreted but the manifest's, whose names cannot lead out of the folder. Raises Unreadable, in one line that
    names host, file and reason, where this host cannot tell.
    """
    try:
        if not _is_folder(folder):
            return GONE
        files = _listed(folder / MANIFEST)
        for name, entry in files.items():
            _check_size(folder / name, entry["bytes"])
        if deep:
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                for name in share(files, rank, num_ranks):
                    if _measure_file(folder / name, pool) != files[name]:
                        raise ValueError(f"{name} has not the checksum that {MANIFEST} says")
    except FileNotFoundError as error:
        if Path(error.filename).name == MANIFEST:
            return f"it has no {MANIFEST}: it was copied in part, or a version before manifests wrote it"
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        if says_nothing(error):
            raise unreadable(folder, error, folder / MANIFEST) from None
        return f"{Path(error.filename or folder / MANIFEST).name[:80]} cannot be opened ({error.strerror or error})"
    except ValueError as error:
        return str(error)
    return None


def says_nothing(error: OSError) -> bool:
    """Whether the error tells of the host that reads, and not of what it reads."""
    return error.errno not in (*_OF_THE_FILES, errno.ENOENT)


def unreadable(folder: Path, error: OSError, path: Path, *, who: str = "") -> Unreadable:
    """That a checkpoint cannot be read, in one line that names host, file and reason.

    path: what could not be read, where the error does not say so. who: the rank, where it is not of this process.
    """
    who = who or f"host {platform.node()}"
    return Unreadable(
        f"{who} cannot read {error.filename or path} ({error.strerror or error}), which says nothing "
        "of the checkpoint: nothing was skipped or deleted; look at that host's mount and rights, or leave it out; if "
        f"the file is lost, delete {folder} to go on from the checkpoint before"
    )


def share(files: dict[str, dict], rank: int, num_ranks: int) -> list[str]:
    """The files that one of several ranks reads, so that all read about as many bytes."""
    loads, mine = [0] * num_ranks, []
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        reader = loads.index(min(loads))
        loads[reader] += files[name]["bytes"] + 1
        if reader == rank:
            mine.append(name)
    return mine


def is_file_name(name) -> bool:
    """Whether this is the name of a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0\n")


def _listed(path: Path) -> dict[str, dict]:
    """The entries of a manifest by file name. Raises ValueError in a few words, OSError where there is none."""
    if _check_regular(path).st_size > _MOST_MANIFEST_BYTES:
        raise ValueError(f"{MANIFEST} is too large to be one")
    try:
        content = read_json(path)
        files = content["files"]
        kind, items = content["checksum"], list(files.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if kind != KIND:
        raise ValueError(f"{MANIFEST} has checksums of another kind ({str(kind)[:40]!r})")
    for name, entry in items:
        if not is_file_name(name) or name == MANIFEST:
            raise ValueError(f"{MANIFEST} names {name[:80]!r}, which is no file of a checkpoint")
        if not (isinstance(entry, dict) and type(entry.get("bytes")) is int and entry["bytes"] >= 0):
            raise ValueError(f"{MANIFEST} is damaged at {name[:80]}")
        if set(entry) != {"bytes", "crc32"} or not _SUM.fullmatch(str(entry["crc32"])):
            raise ValueError(f"{MANIFEST} is damaged at {name[:80]}")
    absent = [name for name in FILES if name not in files]
    if absent:
        raise ValueError(f"{MANIFEST} lacks {absent[0]}")
    return files


def _is_folder(path: Path) -> bool:
    """Whether it is there. Path.is_dir also says no where it cannot be asked."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _check_regular(path: Path) -> os.stat_result:
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is no regular file")
    return found


def _check_size(path: Path, num_bytes: int) -> None:
    found = _check_regular(path).st_size
    if found != num_bytes:
        raise ValueError(f"{path.name} has {found} bytes, not the {num_bytes} that {MANIFEST} says")


def _measure_file(path: Path, pool: ThreadPoolExecutor, *, sync: bool = False) -> dict:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if sync:
            os.fsync(descriptor)
        num_bytes = os.fstat(descriptor).st_size
        starts = range(0, num_bytes, _BLOCK_BYTES)
        sums = pool.map(lambda start: zlib.crc32(_block(descriptor, start)), starts)
        whole = _combined(sums)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)
    return {"bytes": num_bytes, "crc32": whole}


def _combined(sums: Iterable[int]) -> str:
    return f"{zlib.crc32(b''.join(each.to_bytes(4, 'big') for each in sums)):08x}"


def _block(descriptor: int, start: int) -> bytes:
    """One block, also where a read gives less than was asked for."""
    parts, left = [], _BLOCK_BYTES
    while left and (part := os.pread(descriptor, left, start + _BLOCK_BYTES - left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
