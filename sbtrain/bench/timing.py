"""Time of repeated steps and of their parts: device events on a GPU, the host clock on a CPU."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Callable

import torch

Mark = Callable[[str], None]
"""mark(name): the part called `name` ends here and the next one begins."""


class Clock:
    """Marks points of the device's timeline without waiting for it; read() waits once, at the end.

    The part of a step that is called `name` lasts from the previous mark to mark(name), idle time of the device
    included; a step begins where the one before it ended.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._names: list[str] = []
        self._stamps = [self._stamp()]

    def mark(self, name: str) -> None:
        """End the part called name."""
        self._names.append(name)
        self._stamps.append(self._stamp())

    def read(self) -> list[tuple[str, float]]:
        """(name, milliseconds) of every mark, in order."""
        synchronize(self.device)
        pairs = zip(self._names, self._stamps, self._stamps[1:])
        return [(name, self._elapsed_ms(start, end)) for name, start, end in pairs]

    def _stamp(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed_ms(self, start, end) -> float:
        return start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3


@dataclass(frozen=True)
class Timing:
    """steps_ms: whole steps after the warmup. parts_ms: name -> its time in each of them. results: what every step
    returned, warmup included."""

    steps_ms: list[float]
    parts_ms: dict[str, list[float]]
    results: list


def time_steps(step: Callable[[Mark], object], *, num_warmup: int, num_steps: int, device: torch.device) -> Timing:
    """Call step(mark) num_warmup times untimed, then num_steps times. step must mark the same parts every time."""
    results = [step(lambda name: None) for _ in range(num_warmup)]
    synchronize(device)
    clock = Clock(device)
    results += [step(clock.mark) for _ in range(num_steps)]
    marks = clock.read()
    num_parts = len(marks) // num_steps
    laps = [marks[i : i + num_parts] for i in range(0, len(marks), num_parts)]
    parts = {name: [lap[i][1] for lap in laps] for i, (name, _) in enumerate(laps[0])}
    return Timing([sum(ms for _, ms in lap) for lap in laps], parts, results)


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> int:
    """Give back all memory that nothing refers to any more and start a new peak. Returns the bytes still allocated."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
