"""Pace: how long this rank computes in a stretch of a step, without the time that collectives take or wait for others.

In a step all ranks take as long as the slowest one, since they wait for it in collectives. What a rank computes by
itself tells them apart. While a Pace is open, every call of a process group and every wait for one is measured, from
torch's own classes: megatron's and ours alike. On a GPU events in the stream measure, so nothing is waited for, and
the time that the stream stands idle because its host is late counts as this rank's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

_CALLS = (
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce"),
    *("all_gather_single", "all_gather_single_coalesced", "all_to_all_single", "allreduce_coalesced", "alltoall"),
    *("alltoall_base", "barrier", "broadcast", "gather", "recv", "recv_anysource", "reduce", "reduce_scatter"),
    *("_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("reduce_scatter_tensor_coalesced", "scatter", "send", "_end_coalescing"),
)
"""Methods of dist.ProcessGroup that exchange something; no torch has all of them."""


class Pace:
    """Context around the stretch. Afterwards compute_s() is there once the device has finished it.

    Collectives must be called by one thread at a time, as they are in a training step.
    """

    def __init__(self, device: torch.device):
        self._mark = _event if device.type == "cuda" else time.perf_counter
        self._between: Callable = _elapsed_s if device.type == "cuda" else _difference_s
        self._methods: list[tuple[type, str, Callable]] = []
        self._waits: list[tuple] = []

    def __enter__(self) -> Pace:
        for kind, names in ((dist.ProcessGroup, _CALLS), (dist.Work, ("wait",))):
            for name in names:
                if name in vars(kind):
                    self._methods.append((kind, name, vars(kind)[name]))
                    setattr(kind, name, self._measured(getattr(kind, name)))
        self._begin = self._mark()
        return self

    def __exit__(self, *exc) -> None:
        self._end = self._mark()
        for kind, name, method in self._methods:
            setattr(kind, name, method)
        self._methods.clear()

    def compute_s(self) -> float:
        """Seconds of the stretch outside of collectives. On a GPU it waits until the stretch is done."""
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()
        waited_s = sum(self._between(begin, end) for begin, end in self._waits)
        return max(0.0, self._between(self._begin, self._end) - waited_s)

    def _measured(self, method: Callable) -> Callable:
        def call(*args, **kwargs):
            begin = self._mark()
            try:
                return method(*args, **kwargs)
            finally:
                self._waits.append((begin, self._mark()))

        return call


def _event() -> torch.cuda.Event:
    """Behind all that was handed to the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_s(begin, end) -> float:
    return begin.elapsed_time(end) / 1e3


def _difference_s(begin: float, end: float) -> float:
    return end - begin
