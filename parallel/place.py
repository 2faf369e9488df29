"""Place: which primitive this process is in, for whoever asks why a job stands still (parallel.watch).

A mark writes a few attributes: no lock, no clock, no system call, no wait for the device. Where a GPU is watched, a
collective also leaves an event in the stream behind it. What a process is in is a fact of the process, so it is kept
here once, as torch.distributed keeps the process groups.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """What being in a place means for the other ranks.

    work: this rank's own doing, which others may be waiting for. wait: a collective, which needs the others.
    patient: work that may take one rank alone long, such as writing a checkpoint.
    """

    work = "work"
    wait = "wait"
    patient = "patient"


class At(NamedTuple):
    """A place: its name, its kind, and how many places this process has entered up to this one."""

    name: str
    kind: Kind
    number: int


class Trail:
    """The last collectives that were handed to the GPU, each with an event behind it in its stream."""

    def __init__(self, events: list):
        """events: as many as collectives are remembered, such as torch.cuda.Event."""
        self._events, self._places, self._count = events, [None] * len(events), 0

    def leave(self, at: At) -> None:
        """The collective of this place is in the current stream now."""
        slot = self._count % len(self._events)
        self._events[slot].record()
        self._places[slot] = at
        self._count += 1

    def unfinished(self) -> At | None:
        """The first remembered collective that the GPU has not finished. Does not wait; any thread may ask."""
        count = self._count
        for index in range(max(0, count - len(self._events)), count):
            slot = index % len(self._events)
            if not self._events[slot].query():
                return self._places[slot]
        return None


@dataclass
class Here:
    """Where this process is, where it was when the last exception left a place, and what its GPU has still to do.

    on_patience_end: called behind a patient place, whose memory would make others wait longer for this rank.
    """

    at: At = At("between steps", Kind.work, 0)
    broken: At | None = None
    trail: Trail | None = None
    on_patience_end: Callable[[], None] | None = None


here = Here()


class _Mark:
    """Context: this process is in a place of that name. Marks nest; the innermost counts."""

    __slots__ = ("_name", "_kind", "_outer")

    def __init__(self, name: str, kind: Kind):
        self._name, self._kind = name, kind

    def __enter__(self) -> None:
        self._outer = here.at
        here.at = At(self._name, self._kind, self._outer.number + 1)
        if sys.exc_info()[0] is None:  # else this clears away after the exception
            here.broken = None

    def __exit__(self, error, *rest) -> None:
        inner, outer = here.at, self._outer
        if error is not None:
            here.broken = here.broken or inner
        elif here.trail is not None and self._kind is Kind.wait:
            here.trail.leave(inner)
        here.at = At(outer.name, outer.kind, inner.number)
        if self._kind is Kind.patient and here.on_patience_end is not None:
            here.on_patience_end()


def primitive(name: str) -> _Mark:
    """Context around a collective: until it ends, this rank may have to wait for others."""
    return _Mark(name, Kind.wait)


def section(name: str, *, patient: bool = False) -> _Mark:
    """Context around a part of the program, with or without collectives inside.

    patient: one rank may be in there for longer than the others are willing to wait elsewhere.
    """
    return _Mark(name, Kind.patient if patient else Kind.work)
