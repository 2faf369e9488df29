"""Partials: the folders that checkpoints are written in before they have their names, of one start of a run alone.

A job that lost its lock may write on until it notices: no other start has a folder of the same name.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import torch.distributed as dist

from parallel.place import primitive
from sbtrain.checkpoint.manifest import ONE_FOLDER, delete


class Partials:
    """In one folder: checkpoints/ of a run."""

    def __init__(self, folder: Path):
        self._folder, self._start = folder, ""

    def open(self) -> None:
        """Agree on what this start's folders are called. Collective; needed once."""
        if not self._start:
            name = [uuid.uuid4().hex[:8]]
            with primitive("name of unfinished checkpoints"):
                dist.broadcast_object_list(name, src=0)
            self._start = name[0]

    def of(self, step: int) -> Path:
        """Where a checkpoint of that step is written, behind open()."""
        assert self._start, "not opened"
        return self._folder / f"step_{step}.{self._start}.partial"

    def clear(self) -> None:
        """Delete them all, those of other starts too. On rank 0, which holds the lock, while no rank writes."""
        for leftover in self._folder.glob("step_*.partial"):
            delete(leftover)


NO_MEMORY = "no memory for a copy of a tensor"


def not_written(partial: Path, reasons: str) -> ValueError:
    """That a checkpoint could not be written there, and what to do, in one line."""
    lacks = "memory" if NO_MEMORY in reasons else "space"
    advice = "" if ONE_FOLDER in reasons else f", free some {lacks} and start the same command again"
    return ValueError(f"{partial}: {reasons}; the previous checkpoint is intact{advice}")
