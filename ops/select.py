"""Backend selection as a pure function of facts: no imports of kernels, no environment, no state.

What a user may write, in the recipe under `ops:` and in OPS_BACKEND and OPS_BACKEND_<OP>:

    cuda                    this backend or an error; calls that it does not accept are errors too
    cuda or reference       this backend; calls that it does not accept run on the reference
    auto, auto or reference the same two for whatever backend this machine is
"""

from __future__ import annotations

from typing import Callable, Collection, Mapping, NamedTuple, Optional

from ops.backends import Backend
from ops.device import EnvFacts

AUTO = "auto"
OR_REFERENCE = " or reference"


class Selection(NamedTuple):
    """An op's backend. emulated: its files were written for another device. allow_reference: calls that it does not
    accept may run on the reference."""

    backend: str
    reason: str
    emulated: bool = False
    allow_reference: bool = False


class Wish(NamedTuple):
    """What a user wrote, and where. backend None: whatever this machine is."""

    source: str
    backend: Optional[str]
    allow_reference: bool


def platform(facts: EnvFacts, backends: Mapping[str, Backend]) -> tuple[str, str]:
    """(name, reason) of the backend this machine is: OPS_BACKEND, else the first by rank whose probe says yes.

    Raises ValueError with all facts when they contradict each other or Triton fails (OPS_BACKEND=reference does
    without knowing), and when OPS_BACKEND cannot be had.
    """
    forced = _global_wish(facts, backends).backend
    for backend in backends.values():
        problem = backend.contradiction(facts)
        if problem and forced != "reference":
            raise ValueError(f"cannot tell which device this is: {problem}. Facts: {facts.describe()}")
    if facts.triton_error and forced != "reference":
        hint = "" if facts.maca_path else " (on MetaX, set MACA_PATH)"
        raise ValueError(f"Triton is installed but fails: {facts.triton_error}{hint}. Facts: {facts.describe()}")
    if forced is None:
        ranked = sorted(backends.values(), key=lambda backend: backend.rank)
        probes = ((backend.name, backend.probe(facts)) for backend in ranked)
        return next((name, why) for name, (usable, why) in probes if usable)
    usable, why = probe(forced, facts, backends)
    if not usable:
        raise ValueError(f"OPS_BACKEND={forced} is not usable here: {why}; {_ways_out(forced, facts, backends)}")
    return forced, f"OPS_BACKEND, {why}" if is_emulated(forced, facts, backends) else "OPS_BACKEND"


def probe(name: str, facts: EnvFacts, backends: Mapping[str, Backend]) -> tuple[bool, str]:
    """(usable, why) of a backend that is asked for by name: its own probe, or emulation where the facts allow it."""
    if is_emulated(name, facts, backends):
        return True, f"emulated on {facts.device_name}"
    return backends[name].probe(facts)


def is_emulated(name: str, facts: EnvFacts, backends: Mapping[str, Backend]) -> bool:
    """Whether this backend's files would run on another's device, as OPS_EMULATE=1 allows."""
    hosts = [backends[host] for host in backends[name].emulated_on if host in backends]
    return facts.emulate and not backends[name].probe(facts)[0] and any(host.probe(facts)[0] for host in hosts)


def check_overrides(facts: EnvFacts, ops: Collection[str]) -> None:
    """Raise ValueError for a variable OPS_BACKEND_<OP> that would be heard by no op."""
    known = {"OPS_BACKEND", *(f"OPS_BACKEND_{op.upper()}" for op in ops)}
    unknown = sorted(set(facts.overrides) - known)
    if unknown:
        raise ValueError(f"{unknown[0]}: no such op; unset it or choose from: {', '.join(sorted(known))}")


def choose(
    op: str,
    *,
    files: frozenset,
    facts: EnvFacts,
    backends: Mapping[str, Backend],
    recipe: Mapping[str, str],
    why_not: Callable[[str], Optional[str]],
) -> Selection:
    """The backend of one op.

    files: backends that have an implementation file for it. recipe: op -> what its `ops:` says. why_not(backend):
    reason why that file cannot be imported here, or None; asked only about backends that pass their probe.
    Precedence: OPS_BACKEND_<OP>, recipe, OPS_BACKEND, probe. Raises ValueError when what was forced cannot be had.
    """
    name, why = platform(facts, backends)
    wish = _wish(op, facts, backends, recipe)
    if wish.backend is not None:
        _demand(wish, files, facts, backends, why_not)
        emulated = is_emulated(wish.backend, facts, backends)
        reason = wish.source.replace("recipe key", "recipe")
        return Selection(wish.backend, f"{reason}, emulated" if emulated else reason, emulated, wish.allow_reference)
    notes = []
    for candidate in (name, *backends[name].fallback):
        problem = refusal(candidate, files=files, facts=facts, backends=backends, why_not=why_not)
        if problem is None:
            reason = "; ".join([*notes, why if candidate == name else f"fallback of {name}"])
            return Selection(candidate, reason, is_emulated(candidate, facts, backends), wish.allow_reference)
        if why.startswith("OPS_BACKEND") and candidate == name and candidate in files:
            variable = f"OPS_BACKEND_{op.upper()}"
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
    usable, why = probe(name, facts, backends)
    if not usable:
        return why
    if name not in files:
        return "no implementation"
    problem = why_not(name)
    return f"unavailable: {problem}" if problem else None


def read_wish(source: str, text: str, backends: Mapping[str, Backend]) -> Wish:
    """A user's words. Raises ValueError, naming their source, for a backend that does not exist."""
    name = text.strip()
    allow_reference = name.endswith(OR_REFERENCE)
    name = name.removesuffix(OR_REFERENCE).strip()
    if name != AUTO and name not in backends:
        known = ", ".join(sorted(backends))
        raise ValueError(f"{source}={text}: no such backend; choose from: {known}, auto, or one with ' or reference'")
    return Wish(source, None if name == AUTO else name, allow_reference)


def _global_wish(facts, backends) -> Wish:
    return read_wish("OPS_BACKEND", facts.overrides.get("OPS_BACKEND") or AUTO, backends)


def _wish(op, facts, backends, recipe) -> Wish:
    """The most specific wish that names a backend, and the most specific one's word about the reference."""
    variable = f"OPS_BACKEND_{op.upper()}"
    asked = []
    if facts.overrides.get(variable):
        asked.append(read_wish(variable, facts.overrides[variable], backends))
    if op in recipe:
        asked.append(read_wish(f"recipe key ops.{op}", recipe[op], backends))
    if not asked:
        return Wish("", None, _global_wish(facts, backends).allow_reference)
    named = next((wish for wish in asked if wish.backend is not None), asked[0])
    return named._replace(allow_reference=asked[0].allow_reference)


def _demand(wish, files, facts, backends, why_not) -> None:
    def problem(name):
        return refusal(name, files=files, facts=facts, backends=backends, why_not=why_not)

    found = problem(wish.backend)
    if found is not None:
        choices = ", ".join(other for other in backends if problem(other) is None)
        raise ValueError(f"{wish.source}={wish.backend}: {found}; choose from: {choices}")


def _ways_out(forced, facts, backends) -> str:
    usable = ", ".join(name for name in backends if probe(name, facts, backends)[0])
    hosts = [host for host in backends[forced].emulated_on if host in backends and backends[host].probe(facts)[0]]
    return f"choose from: {usable}" + (f"; OPS_EMULATE=1 runs its files on {facts.device_name}" if hosts else "")
