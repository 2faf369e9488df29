"""Backend selection as a pure function of facts: no imports of kernels, no environment, no state."""

from __future__ import annotations

from typing import Callable, Mapping, Optional

from ops.backends import Backend
from ops.device import EnvFacts


def platform(facts: EnvFacts, backends: Mapping[str, Backend]) -> tuple[str, str]:
    """(name, reason) of the backend this machine is: OPS_BACKEND, else the first by rank whose probe says yes.

    Raises ValueError with all facts when they contradict each other, and when OPS_BACKEND cannot be had.
    """
    for backend in backends.values():
        problem = backend.contradiction(facts)
        if problem:
            raise ValueError(f"cannot tell which device this is: {problem}. Facts: {facts.describe()}")
    probes = {name: backend.probe(facts) for name, backend in sorted(backends.items(), key=lambda item: item[1].rank)}
    forced = facts.overrides.get("OPS_BACKEND")
    if forced:
        _demand_known("OPS_BACKEND", forced, backends)
        usable, why = probes[forced]
        if not usable:
            raise ValueError(f"OPS_BACKEND={forced} is not usable here: {why}; choose from: {_usable(probes)}")
        return forced, "OPS_BACKEND"
    return next((name, why) for name, (usable, why) in probes.items() if usable)


def choose(
    op: str,
    *,
    files: frozenset,
    facts: EnvFacts,
    backends: Mapping[str, Backend],
    recipe: Mapping[str, str],
    why_not: Callable[[str], Optional[str]],
) -> tuple[str, str]:
    """(backend, reason) for one op.

    files: backends that have an implementation file for it. recipe: op -> backend, from the recipe. why_not(backend):
    reason why that file cannot be imported here, or None; asked only about backends that pass their probe.
    Precedence: OPS_BACKEND_<OP>, recipe, OPS_BACKEND, probe. Raises ValueError when what was forced cannot be had.
    """
    name, why = platform(facts, backends)
    variable = f"OPS_BACKEND_{op.upper()}"
    if facts.overrides.get(variable):
        return _forced(op, facts.overrides[variable], variable, files, facts, backends, why_not), variable
    if op in recipe:
        return _forced(op, recipe[op], f"recipe key ops.{op}", files, facts, backends, why_not), f"recipe ops.{op}"
    notes = []
    for candidate in (name, *backends[name].fallback):
        problem = refusal(candidate, files=files, facts=facts, backends=backends, why_not=why_not)
        if problem is None:
            return candidate, "; ".join([*notes, why if candidate == name else f"fallback of {name}"])
        if why == "OPS_BACKEND" and candidate == name and candidate in files:
            raise ValueError(f"OPS_BACKEND={name}: op {op} is {problem}; install it or set {variable}=reference")
        notes.append(f"{candidate}: {problem}")
    raise ValueError(f"op {op} has no implementation for {name}: {'; '.join(notes)}; add ops/{op}/reference.py")


def refusal(
    name: str,
    *,
    files: frozenset,
    facts: EnvFacts,
    backends: Mapping[str, Backend],
    why_not: Callable[[str], Optional[str]],
) -> Optional[str]:
    """Why an op cannot run on a backend here, or None when it can."""
    usable, why = backends[name].probe(facts)
    if not usable:
        return why
    if name not in files:
        return "no implementation"
    problem = why_not(name)
    return f"unavailable: {problem}" if problem else None


def _forced(op, name, source, files, facts, backends, why_not) -> str:
    _demand_known(source, name, backends)
    problems = {
        other: refusal(other, files=files, facts=facts, backends=backends, why_not=why_not) for other in backends
    }
    if problems[name] is not None:
        choices = ", ".join(other for other, problem in problems.items() if problem is None)
        raise ValueError(f"{source}={name}: {problems[name]}; choose from: {choices}")
    return name


def _demand_known(source: str, name: str, backends: Mapping[str, Backend]) -> None:
    if name not in backends:
        raise ValueError(f"{source}={name}: no such backend; choose from: {', '.join(sorted(backends))}")


def _usable(probes: Mapping[str, tuple]) -> str:
    return ", ".join(name for name, (usable, _) in probes.items() if usable)
