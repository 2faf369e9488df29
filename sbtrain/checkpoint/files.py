"""Small files that must never be half-written: JSON by write, fsync, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_json(path: Path, value) -> None:
    """Replace path with value as JSON, so that a reader sees the old content or the new one, also after a crash.

    Raises OSError, which names the file.
    """
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context of the writing of a file: an OSError that names none, as that of a write to a full disk, names it."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def read_json(path: Path):
    """The JSON value of a file. Raises ValueError naming the file if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); restore it from a copy or choose another run_dir"
        ) from None


def sync_folder(folder: Path) -> None:
    """Make renames inside folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
