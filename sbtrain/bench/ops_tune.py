"""bench ops tune=true: the fastest legal tiles on this device, one kernel after the other, into the ops' tune files.

A candidate is timed in the whole op, forward and backward, with the other kernels as they are. Searched is what an op's
backend file says in SPACE (kernel -> key -> values); for other keys the present value, its half and its double, for
num_stages 1 to 4. The few fastest are timed again in turns with the present tiles, and must be right to be taken.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from typing import Iterator, Mapping, Optional

from ops import tuning
from ops.device import collect, device_model
from ops.discover import catalog
from ops.registry import resolve
from sbtrain.bench.ops_case import Case, Version, wanted
from sbtrain.bench.ops_contest import TOLERANCES, own_versions
from sbtrain.bench.ops_errors import Truth, errors, find_truth, reason
from sbtrain.bench.ops_measure import Entry, Problem, Settings, Stopwatch, race
from sbtrain.bench.record import aligned
from sbtrain.bench.timing import release_memory, spread, synchronize

NUM_FINALISTS, NUM_ROUNDS = 3, 3
WORTH_IT = 0.99
"""Time against the present tiles' at which others replace them: less of a gain is noise."""
HOPELESS = 1.3
"""A candidate that is this much slower on one input is not timed on the others."""
STAGES = (1, 2, 3, 4)


COMPILER_NOTES = ("shared_bytes", "private_bytes", "registers")


class DeviceLost(RuntimeError):
    """The device answers no more after a candidate: nothing else can run in this process."""


@dataclass
class Work:
    """One case at one length: what a candidate is timed on, and the truth that it must agree with."""

    case: Case
    version: Version
    entry: Entry
    which: str
    truth: Truth
    present_ms: float = 0.0


@dataclass
class Search:
    """What was tried for one kernel. ratio: time against the present tiles', a geometric mean over inputs.

    notes: what the tune file says of the present tiles. tried: {"entry", "notes", "ratio", "ran" or "problem"}, for
    finalists also "again" (in turns with the present tiles) and "wrong"; ran: Triton compiled something. reached:
    the inputs make the op launch this kernel. left: legal configurations that there was no time for.
    """

    op: str
    backend: str
    kernel: str
    present: dict
    notes: dict
    tried: list[dict] = field(default_factory=list)
    left: int = 0
    reached: bool = True
    best: Optional[dict] = None
    finished: bool = False
    file: Optional[str] = None


def space(op: str, backend: str, kernel: str, present: Mapping) -> list[dict]:
    """Legal launch arguments for a kernel, the present ones left out; the most like them first."""
    declared = getattr(import_module(catalog().files[op][backend].module), "SPACE", {}).get(kernel, {})
    values = {key: declared.get(key, _around(key, value)) for key, value in present.items()}
    facts, found = collect(), []
    for choice in product(*values.values()):
        entry = dict(zip(values, choice))
        if entry != dict(present) and tuning.candidate_problem(op, backend, kernel, entry, facts) is None:
            found.append(entry)
    return sorted(found, key=lambda entry: sum(entry[key] != present[key] for key in entry))


def _around(key: str, value) -> tuple:
    if isinstance(value, bool) or not isinstance(value, int) or key == "num_ctas":
        return (value,)
    if key == "num_stages":
        return STAGES
    return tuple(dict.fromkeys((value, max(1, value // 2), value * 2)))


class Tuner:
    """Searches the kernels of one op on the backend that runs here.

    tune_limit_s: for one kernel. kernels: names, without them all. Raises ValueError when the op has no tiles, or none
    of these kernels.
    """

    def __init__(
        self,
        op: str,
        cases: list[Case],
        settings: Settings,
        stopwatch: Stopwatch,
        *,
        tune_limit_s: float,
        kernels: tuple[str, ...] = (),
    ):
        self.op, self.settings, self.stopwatch, self.tune_limit_s = op, settings, stopwatch, tune_limit_s
        self.backend = resolve(op).backend
        if not tuning.tune_file(op, self.backend).exists():
            raise ValueError(f"op {op} on {self.backend} has no tiles to tune")
        known = tuning.tiles(op, self.backend)
        self.kernels = [name for name in known if not kernels or name in kernels]
        if not self.kernels:
            raise ValueError(f"op {op} on {self.backend} has the kernels {', '.join(known)}")
        self.cases = cases
        self.works: list[Work] = []

    def prepare(self, lengths: tuple[int, ...], error_tokens: int) -> None:
        """Draw the inputs. A case that does not reach the backend's kernels is of no use, but does no harm."""
        truths: dict[tuple, Truth] = {}
        for case in self.cases:
            (version,) = own_versions(case, (self.backend,))
            call = version.load()
            for num_tokens in sorted({min(length, case.max_tokens or length) for length in lengths}):
                checked = min(num_tokens, error_tokens, case.check_tokens or num_tokens)
                if (case.title, checked) not in truths:
                    truths[case.title, checked] = find_truth(case, checked, self.settings)
                problem = Problem.draw(case, num_tokens, self.settings)
                which = "both" if wanted(problem.sets[0]) else "forward"
                entry = Entry(version, call, problem)
                self.works.append(Work(case, version, entry, which, truths[case.title, checked]))

    def searches(self, source: str) -> Iterator[Search]:
        """Every kernel; the search so far is given after each candidate, and last with its result."""
        for kernel in self.kernels:
            present = tuning.tiles(self.op, self.backend)[kernel]
            entry = tuning.select(self.op, self.backend, collect()).entries[kernel]
            notes = {key: entry[key] for key in COMPILER_NOTES if key in entry}
            search = Search(self.op, self.backend, kernel, dict(present), notes)
            yield from self._try_all(search)
            search.reached = any("problem" in tried or tried["ran"] for tried in search.tried)
            if search.reached:
                self._decide(search)
                self._save(search, source)
            search.finished = True
            yield search

    def _try_all(self, search: Search) -> Iterator[Search]:
        for work in self.works:
            work.entry.warm(work.which, self.settings)
            work.present_ms = self._median_ms(work, self.settings)
        candidates, began = space(self.op, self.backend, search.kernel, search.present), time.perf_counter()
        for number, entry in enumerate(candidates):
            if time.perf_counter() - began > self.tune_limit_s:
                search.left = len(candidates) - number
                return
            search.tried.append({"entry": entry, **self._attempt(search.kernel, entry)})
            yield search

    def _attempt(self, kernel: str, entry: dict) -> dict:
        """{"ratio", "notes", "ran"} or {"problem"}."""
        ratios, before = [], compiled(self.op)
        try:
            with tuning.trying(self.op, self.backend, {kernel: entry}):
                for work in self.works:
                    work.entry.warm(work.which, self.settings)
                    ratios.append(self._median_ms(work, self.settings) / work.present_ms)
                    if ratios[-1] > HOPELESS:
                        break
        except Exception as error:  # too much shared memory, a tile that does not compile, ...
            self._demand_device(kernel, entry, error)
            return {"problem": reason(error)}
        new = None if before is None else compiled(self.op) - before
        return {"ratio": _mean(ratios), "notes": compiler_notes(new or set()), "ran": new is None or bool(new)}

    def _median_ms(self, work: Work, settings: Settings) -> float:
        work.entry.failure, work.entry.times = None, []
        work.entry.run(work.which)  # new tiles are looked up, and not part of the time
        times = race([work.entry], work.which, settings, self.stopwatch)
        if work.entry.failure is not None:
            raise work.entry.failure
        return spread(times[work.version.name])["median"]

    def _decide(self, search: Search) -> None:
        """The fastest of the best few that are right, each timed again in turns with the present tiles."""
        promising = sorted((t for t in search.tried if t.get("ratio", 1.0) < WORTH_IT), key=lambda t: t["ratio"])
        finalists: list[dict] = []
        for tried in promising:
            tried["wrong"] = self._wrong(search.kernel, tried["entry"])
            if tried["wrong"] is None:
                finalists.append(tried)
            if len(finalists) == NUM_FINALISTS:
                break
        for tried in finalists:
            tried["again"] = self._duel(search.kernel, search.present, tried["entry"])
        best = min(finalists, key=lambda t: t["again"], default=None)
        if best is not None and best["again"] < WORTH_IT:
            search.best = best

    def _duel(self, kernel: str, present: dict, entry: dict) -> float:
        """Time of the entry against the present one, A B A B."""
        medians: dict[int, list[list[float]]] = {0: [], 1: []}
        for number in range(2 * NUM_ROUNDS):
            with tuning.trying(self.op, self.backend, {kernel: entry if number % 2 else present}):
                medians[number % 2].append([self._median_ms(work, self.settings) for work in self.works])
        best = [[min(times) for times in zip(*medians[which])] for which in (0, 1)]
        return _mean([new / old for old, new in zip(*best)])

    def _wrong(self, kernel: str, entry: dict) -> Optional[str]:
        """What is wrong with the results, or None."""
        limit = TOLERANCES[self.settings.dtype]
        with tuning.trying(self.op, self.backend, {kernel: entry}):
            for work in self.works:
                try:
                    found, problem = errors(work.version, work.entry.call, work.truth, self.settings)
                except Exception as error:
                    self._demand_device(kernel, entry, error)
                    return reason(error)
                if problem is not None:
                    return reason(problem)
                off = [found[key] for key in ("error", "gradient_error") if key in found]
                if work.case.compared and any(not value <= limit for value in off):
                    return f"{work.case.title}: error {max(off):.1e}"
                if found.get("repeats") is False:
                    return f"{work.case.title}: two backward passes differ"
        return None

    def _save(self, search: Search, source: str) -> None:
        """The chosen tiles, also where they are the present ones: they were measured on this device now."""
        chosen = search.best or {"entry": search.present, "notes": search.notes}
        entry = {**chosen["entry"], **chosen["notes"], "status": "measured", "source": source}
        model = device_model(collect().device_name)
        search.file = str(tuning.save_tiles(self.op, self.backend, model, {search.kernel: entry}))

    def _demand_device(self, kernel: str, entry: dict, error: Exception) -> None:
        try:
            release_memory(self.settings.device)
            synchronize(self.settings.device)
        except Exception:
            raise DeviceLost(f"{self.op}.{kernel} with {entry}: {reason(error)}") from error


def compiled(op: str) -> Optional[set]:
    """Every kernel of the op that Triton holds compiled in this process; None where this Triton does not show them."""
    package = f"{catalog().packages[op]}."
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(package)]
    kernels = [x for module in modules for x in list(vars(module).values()) if hasattr(x, "device_caches")]
    if not kernels:
        return None
    return {found for kernel in kernels for cache in kernel.device_caches.values() for found in cache[0].values()}


def compiler_notes(kernels: set) -> dict:
    """What the compiler reported, the most of these kernels; nothing where it did not report."""
    reports = {
        "shared_bytes": [getattr(kernel.metadata, "shared", None) for kernel in kernels],
        "private_bytes": [getattr(kernel, "n_spills", None) for kernel in kernels],
        "registers": [getattr(kernel, "n_regs", None) for kernel in kernels],
    }
    found = {key: max(values) for key, values in reports.items() if values and None not in values}
    if "private_bytes" in found:
        found["private_bytes"] *= 4  # a spilled register
    return found


def progress(search: Search) -> str:
    """The last thing that was tried, or what was decided, on one line."""
    name = f"{search.op}.{search.kernel}"
    if search.finished:
        return f"{name}: {_outcome(search)}" + (f", written to {search.file}" if search.file else "")
    last = search.tried[-1]
    found = last["problem"] if "problem" in last else f"{last['ratio']:.3f} of the present time"
    return f"  {name} {_tiles(last['entry'])}: {found}"


def _outcome(search: Search) -> str:
    if not search.reached:
        return "not launched for these inputs"
    if search.best is None:
        return "present tiles kept"
    return f"{_tiles(search.best['entry'])} in {search.best['again']:.3f} of the time"


def summary(searches: list[Search]) -> str:
    """A table of kernels: present tiles, what replaced them, and how many were tried."""
    header = ("op kernel", "tried", "failed", "left", "time of the new tiles", "tiles")
    rows = []
    for search in searches:
        failed = sum("problem" in tried for tried in search.tried)
        best = search.best
        kept = ", kept" if search.reached else ", not launched for these inputs"
        tiles = _tiles(search.present) + (f" -> {_tiles(best['entry'])}" if best else kept)
        counts = (f"{len(search.tried)}", f"{failed}", f"{search.left}")
        rows.append((f"{search.op} {search.kernel}", *counts, f"{best['again']:.3f}" if best else "-", tiles))
    return aligned(header, rows)


def _tiles(entry: Mapping) -> str:
    return " ".join(f"{key}={value}" for key, value in entry.items())


def _mean(ratios: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
