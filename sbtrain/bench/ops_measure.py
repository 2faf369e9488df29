"""Times and memory of the versions of a case, taken in turns (A B A B ...) so that a drift of the machine hits all."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Optional

import torch
from torch import Tensor

from sbtrain.bench.ops_case import Case, Draw, Inputs, Version, detached, leaves, num_bytes, wanted
from sbtrain.bench.timing import synchronize

TIMED_S = 2.0
"""Timed calls of one measurement stop at about this much; MIN_STEPS are made in any case."""
MIN_STEPS = 3
SLOWEST_S = 5.0
"""A version that is expected to need longer for one call, by its time at a shorter length, is left out."""
COVER_MS, MAX_COVER_MS = 0.1, 5.0
CACHES, LARGE_CACHE_BYTES = 4.0, 2**26
MAX_SETS = 8


@dataclass(frozen=True)
class Settings:
    """How to measure. time_limit_s: for a version's first call with its compilation and tuning."""

    device: torch.device
    dtype: torch.dtype
    steps: int
    warmup: int
    time_limit_s: float
    seed: int


class Stopped(Exception):
    """A version used up its time limit."""


@contextmanager
def deadline(seconds: float):
    """Raise Stopped inside after this time, at the next line of Python that runs. Backward passes run in this thread,
    so that one that tunes its kernels is reached, too. Without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise Stopped(f"stopped after {seconds:.0f} s (time_limit_s)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Stopwatch:
    """Time of a call on the device. The device is kept busy before it, so that launching is not part of the time."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            cycles = 10**7
            torch.cuda._sleep(cycles)
            pair = self._record(lambda: torch.cuda._sleep(cycles))
            torch.cuda.synchronize()
            self.cycles_per_ms = cycles / pair[0].elapsed_time(pair[1])

    def start(self, call: Callable[[], object], *, cover_ms: float) -> Callable[[], float]:
        """Run call(); what is returned gives its milliseconds, once the device is done."""
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            elapsed_ms = (time.perf_counter() - began) * 1e3
            return lambda: elapsed_ms
        torch.cuda._sleep(int(self.cycles_per_ms * min(cover_ms, MAX_COVER_MS)))
        begin, end = self._record(call)
        return lambda: begin.elapsed_time(end)

    def _record(self, call):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        return begin, end


@dataclass
class Problem:
    """The inputs of a case at one length, in as many sets as it takes to not fit the cache, and upstream gradients."""

    case: Case
    num_tokens: int
    sets: list[dict]
    upstreams: list[Tensor] = field(default_factory=list)

    @classmethod
    def draw(cls, case: Case, num_tokens: int, settings: Settings) -> Problem:
        """Fresh random inputs, the same for every version."""
        first = case.inputs(Draw(settings.device, settings.dtype, settings.seed), num_tokens)
        num_sets = sets_for(num_bytes(first.values()), settings.device)
        others = (
            case.inputs(Draw(settings.device, settings.dtype, settings.seed + number), num_tokens)
            for number in range(1, num_sets)
        )
        return cls(case, num_tokens, [first, *others])

    def upstream(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """A fixed random gradient of every differentiable output; 1 for a scalar, as of a loss."""
        if not self.upstreams:
            generator = torch.Generator(outputs[0].device).manual_seed(self.num_tokens)
            self.upstreams = [_gradient(x, generator) for x in outputs if x.requires_grad]
        return self.upstreams


def sets_for(input_bytes: int, device: torch.device) -> int:
    """Sets of inputs that together exceed the device's cache by far."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None) or LARGE_CACHE_BYTES
    return int(min(MAX_SETS, max(1, -(-CACHES * cache // max(input_bytes, 1)))))


def _gradient(output: Tensor, generator: torch.Generator) -> Tensor:
    if output.dim() == 0:
        return torch.ones_like(output)
    return torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)


class Entry:
    """A version in the race: its call, its own inputs, and what was seen of it.

    call_ms: one whole call, launch included. host_ms: until the call came back. first_call_s: with compilation.
    peak_memory_bytes: most that was allocated during a call, above what was there before; None on a CPU. failure: what
    it raised in the race.
    """

    def __init__(self, version: Version, call: Callable[[Inputs], tuple[Tensor, ...]], problem: Problem):
        prepare = version.prepare
        self.version, self.call, self.problem = version, call, problem
        self.sets = [leaves(prepare(inputs), copy=version.in_place) for inputs in problem.sets]
        self.plain_sets = [detached(inputs) for inputs in self.sets]
        self.upstreams: Optional[list[Tensor]] = None
        self.failure: Optional[Exception] = None
        self.times: list[Callable[[], float]] = []

    def run(self, which: str, number: int = 0) -> tuple[Tensor, ...]:
        """Outputs (forward) or gradients (both) on one of the sets of inputs."""
        if which == "forward":
            with torch.no_grad():
                return self.call(self.plain_sets[number % len(self.sets)])
        inputs = self.sets[number % len(self.sets)]
        outputs = self.call(inputs)
        if self.upstreams is None:
            shared = self.problem.upstream(outputs)
            self.upstreams = [x.clone() for x in shared] if self.version.in_place else shared
        differentiated = [x for x in outputs if x.requires_grad]
        return torch.autograd.grad(differentiated, list(wanted(inputs).values()), self.upstreams)

    def warm(self, which: str, settings: Settings) -> None:
        """First calls: compile and tune, then note launch time, whole time and memory. Raises what the version does."""
        self.times = []
        with deadline(settings.time_limit_s):
            began = time.perf_counter()
            self.run(which)
            synchronize(settings.device)
            self.first_call_s = time.perf_counter() - began
        on_gpu = settings.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated() if on_gpu else 0, time.perf_counter()
        results = self.run(which)
        self.host_ms = (time.perf_counter() - began) * 1e3
        synchronize(settings.device)
        self.call_ms = (time.perf_counter() - began) * 1e3
        self.peak_memory_bytes = torch.cuda.max_memory_allocated() - before if on_gpu else None
        del results
        for number in range(min(settings.warmup, int(TIMED_S / 2e-3 / self.call_ms))):
            self.run(which, number)
        synchronize(settings.device)

    def num_steps(self, settings: Settings) -> int:
        """Timed calls that fit the time there is for them."""
        return min(settings.steps, max(MIN_STEPS, int(TIMED_S * 1e3 / self.call_ms)))


def race(entries: list[Entry], which: str, settings: Settings, stopwatch: Stopwatch) -> dict[str, list[float]]:
    """Milliseconds of every timed call by version. The entries are warm; they take turns. One that raises is out."""
    steps = {id(entry): entry.num_steps(settings) for entry in entries}
    for number in range(max(steps.values(), default=0)):
        for entry in entries:
            if entry.failure is not None or number >= steps[id(entry)]:
                continue
            cover_ms = COVER_MS + 1.5 * entry.host_ms
            try:
                entry.times.append(stopwatch.start(partial(entry.run, which, number), cover_ms=cover_ms))
            except Exception as error:  # out of memory, say: the others go on
                entry.failure = error
    synchronize(settings.device)
    return {entry.version.name: [read() for read in entry.times] for entry in entries if entry.failure is None}
