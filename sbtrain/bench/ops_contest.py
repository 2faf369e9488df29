"""One case of `bench.py ops`: all its versions over lengths and passes, as rows of the report."""

from __future__ import annotations

from functools import partial
from typing import Callable, Iterator, Optional

import torch

from ops.device import collect
from ops.discover import descriptors, scan
from ops.registry import Refused, resolve, why_not
from ops.select import refusal
from sbtrain.bench.ops_case import Case, Inputs, Version, moved_bytes, num_bytes, useful_flops, wanted
from sbtrain.bench.ops_ceilings import floor_ms
from sbtrain.bench.ops_errors import Truth, answers, errors, find_truth, reason, worst
from sbtrain.bench.ops_measure import SLOWEST_S, Entry, Problem, Settings, Stopped, Stopwatch, race
from sbtrain.bench.timing import release_memory, spread

TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
"""Relative error beyond which a version computes something else."""


class Contest:
    """A case's versions: ours first, the one that the op table chooses before all. Peers are optional."""

    def __init__(
        self,
        case: Case,
        settings: Settings,
        stopwatch: Stopwatch,
        limits: dict,
        *,
        backends: tuple[str, ...] = (),
        peers: bool = True,
    ):
        self.case, self.settings, self.stopwatch, self.limits = case, settings, stopwatch, limits
        own = own_versions(case, backends)
        self.ours = {version.name for version in own}
        self.versions = [*own, *(case.peers if peers else ())]
        self.calls: dict[str, Callable] = {}
        self.errors: dict[tuple[str, int], dict] = {}
        self.refused: dict[tuple[str, str], str] = {}  # (version, pass) -> why it is left out from there on
        self.failed: set[str] = set()  # versions that raised what they should not
        self.seen: dict[tuple[str, str], tuple[float, int, float]] = {}  # flops, bytes and ms at the last length

    def rows(self, lengths: tuple[int, ...], passes: tuple[str, ...], *, error_tokens: int) -> Iterator[dict]:
        """Measure, shortest length first: what does not fit or is too slow at one is not tried at the next."""
        for version in self.versions:
            self._load(version, passes)
        for num_tokens in sorted({min(length, self.case.max_tokens or length) for length in lengths}):
            checked = min(num_tokens, error_tokens, self.case.check_tokens or num_tokens)
            self._find_errors(checked, passes)
            yield from self._length(num_tokens, passes, checked)
            release_memory(self.settings.device)

    def _load(self, version: Version, passes: tuple[str, ...]) -> None:
        if version.gpu_only and self.settings.device.type != "cuda":
            self._refuse(version, passes, "needs a GPU")
            return
        try:
            self.calls[version.name] = version.load()
        except ModuleNotFoundError as error:
            self._refuse(version, passes, f"{(error.name or '').split('.')[0]} is not installed")
        except (ImportError, ValueError) as error:
            self._refuse(version, passes, str(error).splitlines()[0])

    def _refuse(self, version: Version, passes: tuple[str, ...], why: str) -> None:
        for which in passes:
            self.refused.setdefault((version.name, which), why)

    def _raised(self, version: Version, passes: tuple[str, ...], error: Exception) -> None:
        """A version could not go on: memory, time and calls that it does not accept are limits, all else is a
        failure."""
        if isinstance(error, torch.OutOfMemoryError):
            self._refuse(version, passes, "out of memory")
        elif isinstance(error, (Stopped, Refused)):
            self._refuse(version, passes, str(error).partition(";")[0])
        else:
            self._refuse(version, passes, reason(error))
            self.failed.add(version.name)

    def _find_errors(self, num_tokens: int, passes: tuple[str, ...]) -> None:
        """Errors of all versions at this length, if they are not known yet."""
        pending = [v for v in self.versions if v.name in self.calls and (v.name, num_tokens) not in self.errors]
        pending = [v for v in pending if any((v.name, which) not in self.refused for which in passes)]
        if not pending:
            return
        release_memory(self.settings.device)
        try:
            truth: Optional[Truth] = find_truth(self.case, num_tokens, self.settings)
        except torch.OutOfMemoryError:
            truth = None
        for version in pending:
            found = {"error_problem": f"the reference runs out of memory at {num_tokens} tokens"}
            if truth is not None:
                try:
                    found, problem = errors(version, self.calls[version.name], truth, self.settings)
                    if problem is not None:
                        self._raised(version, ("both",), problem)
                except Exception as error:  # whatever a peer raises is its row, not the end of the run
                    self._raised(version, passes, error)
            self.errors[version.name, num_tokens] = found

    def _length(self, num_tokens: int, passes: tuple[str, ...], checked: int) -> Iterator[dict]:
        try:
            problem = Problem.draw(self.case, num_tokens, self.settings)
        except torch.OutOfMemoryError:
            for version in self.versions:
                self._refuse(version, passes, "out of memory")
            problem = Problem(self.case, num_tokens, [{}])
        if problem.sets[0] and not wanted(problem.sets[0]):
            passes = tuple(which for which in passes if which == "forward")
        entries: dict[str, Entry] = {}
        for which in passes:
            yield from self._pass(which, problem, entries, checked)

    def _pass(self, which: str, problem: Problem, entries: dict[str, Entry], checked: int) -> Iterator[dict]:
        live = [version for version in self.versions if self._warmed(version, which, problem, entries)]
        live = [entries[version.name] for version in live]
        times = race(live, which, self.settings, self.stopwatch)
        for entry in live:
            if entry.failure is not None:
                self._raised(entry.version, (which,), entry.failure)
                del entries[entry.version.name]
        live = [entry for entry in live if entry.failure is None]
        medians = {name: spread(found)["median"] for name, found in times.items()}
        ours_ms = next((medians[entry.version.name] for entry in live if entry.version.name in self.ours), None)
        floor = self._floor(which, problem, live[0]) if live else None
        differences = self._differences(which, problem, live, checked)
        for version in self.versions:
            row = {
                "op": self.case.op,
                "case": self.case.name,
                "num_tokens": problem.num_tokens,
                "pass": which,
                "version": version.name,
                "ours": version.name in self.ours,
                **self._error_columns(version, which, checked),
            }
            if version.name in times:
                row.update(self._speed(entries[version.name], which, times[version.name], floor))
                row["difference"] = differences.get(version.name)
                row["speed_against_ours"] = ours_ms / medians[version.name] if ours_ms else None
            else:
                row["problem"] = self.refused[version.name, which]
                row["wrong"] = row["wrong"] or version.name in self.failed & self.ours
            yield row

    def _warmed(self, version: Version, which: str, problem: Problem, entries: dict[str, Entry]) -> bool:
        """Whether the version is ready to be timed; if not, why is in refused."""
        if (version.name, which) in self.refused:
            return False
        flops, moved = useful_flops(self.case, problem.num_tokens, which), num_bytes(problem.sets[0].values())
        if (version.name, which) in self.seen:
            before = self.seen[version.name, which]
            growth = max(moved / before[1], flops / before[0] if before[0] else 0.0)
            if before[2] * growth > SLOWEST_S * 1e3:
                self._refuse(version, (which,), f"too slow: about {before[2] * growth / 1e3:.0f} s a call")
                return False
        try:
            if version.name not in entries:
                entries[version.name] = Entry(version, self.calls[version.name], problem)
            entry = entries[version.name]
            entry.warm(which, self.settings)
        except Exception as error:  # as in _find_errors
            self._raised(version, (which,), error)
            entries.pop(version.name, None)
            del error
            release_memory(self.settings.device)
            return False
        self.seen[version.name, which] = (flops, moved, entry.call_ms)
        where = f"{self.case.title} {problem.num_tokens} {which}"
        print(f"  {where} {version.name}: first call {entry.first_call_s:.1f} s", flush=True)
        return True

    def _floor(self, which: str, problem: Problem, entry: Entry) -> dict:
        """What the pass must do at least, and how long that takes on this machine."""
        outputs = entry.run("forward")
        flops = useful_flops(self.case, problem.num_tokens, which)
        moved = moved_bytes(self.case, problem.sets[0], outputs, which)
        shortest_ms, unit = floor_ms(flops, moved, self.limits)
        return {"flops": flops, "bytes": moved, "floor_ms": shortest_ms, "unit": unit}

    def _speed(self, entry: Entry, which: str, times: list[float], floor: dict) -> dict:
        ms = spread(times)
        work = floor["flops"] / 1e9 if floor["unit"] == "TFLOP/s" else floor["bytes"] / 1e6
        return {
            "ms": ms,
            "steps": len(times),
            "first_call_s": entry.first_call_s,
            "host_ms": entry.host_ms,
            **floor,
            "rate": work / ms["median"],
            "of_ceiling": floor["floor_ms"] / ms["median"],
            "peak_memory_bytes": entry.peak_memory_bytes,
        }

    def _error_columns(self, version: Version, which: str, checked: int) -> dict:
        found = self.errors.get((version.name, checked), {})
        keys = ("error_tokens", "error", "error_problem")
        keys += ("gradient_error", "worst_gradient", "repeats") if which == "both" else ()
        columns = {key: found[key] for key in keys if key in found}
        limit = TOLERANCES[self.settings.dtype]
        values = [columns[key] for key in ("error", "gradient_error") if key in columns]
        # not <= holds for NaN
        return {**columns, "wrong": self.case.compared and any(not value <= limit for value in values)}

    def _differences(self, which: str, problem: Problem, live: list[Entry], checked: int) -> dict[str, Optional[float]]:
        """Relative difference to the first version at the timed length, where errors were measured at a shorter one:
        an index that overflows shows at full length only."""
        if problem.num_tokens <= checked or len(live) < 2 or not self.case.compared:
            return {}
        differences: dict[str, Optional[float]] = {}
        first = None
        for entry in live:
            try:
                upstreams = problem.upstreams if which == "both" else []
                found = answers(entry.version, entry.call, problem.sets[0], upstreams)
                if first is None:
                    first = found
                else:
                    differences[entry.version.name] = worst(found, first)[1]
                del found
            except torch.OutOfMemoryError:
                differences[entry.version.name] = None
            release_memory(self.settings.device)
        return differences


def own_versions(case: Case, backends: tuple[str, ...]) -> list[Version]:
    """Our backends of a case: the given ones, or all that have a file for the op and a device that they can run on;
    the one that the op table chooses comes first, the reference last."""
    files, facts = scan()[case.op], collect()
    here = [name for name, backend in descriptors().items() if name in files and backend.probe(facts)[0]]
    names = backends or here
    chosen = resolve(case.op).backend
    order = sorted(dict.fromkeys(names), key=lambda name: (name != chosen, name == "reference"))
    return [Version(name, partial(_own, case, name), gpu_only=False) for name in order]


def _own(case: Case, name: str) -> Callable[[Inputs], tuple]:
    facts, known = collect(), descriptors()
    problem = refusal(
        name,
        files=scan()[case.op],
        facts=facts,
        backends=known,
        why_not=lambda backend: why_not(case.op, known[backend]),
    )
    if problem is not None:
        raise ValueError(problem)
    choice = resolve(case.op, {case.op: name})
    if choice.backend != name:
        raise ValueError(f"{choice.reason} forces {choice.backend}")
    return partial(case.call, choice.functions)
