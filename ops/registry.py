"""The op table: which file implements each op on this machine, found by scanning folders, resolved once, explained.

Scanning imports no implementation: an implementation file is imported only when its backend passes its probe and is
asked for. There is no fallback while training runs: a choice is made when it is first needed and then kept.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Callable, Mapping, Optional

import torch

from ops.backends import Backend
from ops.device import EnvFacts, collect
from ops.select import choose, platform, refusal

LOG = logging.getLogger("ops")
ROOT = Path(__file__).parent
DEVICE_BLIND = ("cpu", "meta")
"""Devices on which only the reference runs, whatever accelerator the machine has."""


@dataclass(frozen=True)
class Choice:
    """An op resolved to a backend. functions: public name -> implementation; `function` is the one named as the op."""

    op: str
    backend: str
    reason: str
    functions: Mapping[str, Callable] = field(repr=False)

    @property
    def function(self) -> Callable:
        """The op's main function."""
        return self.functions[self.op]


@dataclass
class Table:
    """The process's op table: recipe overrides, and the choices made so far."""

    recipe: Mapping[str, str] = field(default_factory=dict)
    choices: dict = field(default_factory=dict)


TABLE = Table()


def scan(root: Path = ROOT) -> dict[str, frozenset]:
    """op -> backends that have a file for it. An op is a folder with `__init__.py` and `reference.py`."""
    known = backend_names(root)
    folders = [path.parent for path in sorted(root.glob("*/reference.py")) if path.parent.name != "backends"]
    return {
        folder.name: frozenset(name for name in known if (folder / f"{name}.py").exists())
        for folder in folders
        if (folder / "__init__.py").exists()
    }


def backend_names(root: Path = ROOT) -> list[str]:
    """Names of the files in ops/backends."""
    return sorted(path.stem for path in (root / "backends").glob("*.py") if path.stem != "__init__")


def backends() -> dict[str, Backend]:
    """Descriptor of every backend, in probe order."""
    found = [import_module(f"ops.backends.{name}").BACKEND for name in backend_names()]
    return {backend.name: backend for backend in sorted(found, key=lambda backend: backend.rank)}


def use(recipe: Mapping[str, str]) -> None:
    """Set the recipe's `ops:` mapping (op -> backend) and forget earlier choices. Call before layers are built.

    Raises ValueError at once for unknown ops and for backends that cannot be had here.
    """
    unknown = sorted(set(recipe) - set(scan()))
    if unknown:
        raise ValueError(f"recipe key ops.{unknown[0]}: no such op; choose from: {', '.join(scan())}")
    TABLE.recipe, TABLE.choices = dict(recipe), {}
    for op in recipe:
        resolve(op)


def resolve(op: str, overrides: Optional[Mapping[str, str]] = None) -> Choice:
    """The implementation of an op on this machine; logged once. overrides (op -> backend) replaces the recipe's.

    Raises ValueError when a forced backend is unavailable or when device facts contradict each other.
    """
    if overrides is None and op in TABLE.choices:
        return TABLE.choices[op]
    files = scan()
    if op not in files:
        raise ValueError(f"no such op: {op}; choose from: {', '.join(files)}")
    known = backends()
    backend, reason = choose(
        op,
        files=files[op],
        facts=collect(),
        backends=known,
        recipe=TABLE.recipe if overrides is None else overrides,
        why_not=lambda name: why_not(op, known[name]),
    )
    choice = Choice(op, backend, reason, _functions(op, backend))
    if overrides is None:
        TABLE.choices[op] = choice
        LOG.info("ops.%s -> %s (%s)", op, backend, reason)
    return choice


def implementation(op: str, name: str, tensor: torch.Tensor) -> Callable:
    """Function `name` of an op for a call on `tensor`'s device: the table's choice, or the reference off-device."""
    if tensor.device.type in DEVICE_BLIND:
        return getattr(import_module(f"ops.{op}.reference"), name)
    return resolve(op).functions[name]


def why_not(op: str, backend: Backend) -> Optional[str]:
    """Reason why an implementation file cannot be imported: a missing optional package. Other failures are raised."""
    try:
        import_module(f"ops.{op}.{backend.name}")
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in backend.optional_packages:
            raise
        return f"{package} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
    return None


def rows(facts: Optional[EnvFacts] = None) -> list[tuple[str, str, str, str]]:
    """(op, backend, "chosen" or "", reason) for every op x backend."""
    facts = facts or collect()
    known = backends()
    result = []
    for op, files in scan().items():
        chosen = resolve(op)
        for name, backend in known.items():
            problem = refusal(
                name, files=files, facts=facts, backends=known, why_not=lambda _, b=backend, o=op: why_not(o, b)
            )
            mark = "chosen" if name == chosen.backend else ""
            result.append((op, name, mark, chosen.reason if mark else problem or "available"))
    return result


def table() -> dict[str, dict]:
    """op -> {"backend", "reason"}, plus the platform under "platform": what env.json and checkpoints keep."""
    choices = {op: resolve(op) for op in scan()}
    result = {op: {"backend": choice.backend, "reason": choice.reason} for op, choice in choices.items()}
    result["platform"] = dict(zip(("backend", "reason"), platform(collect(), backends())))
    return result


def table_hash() -> str:
    """Hash of op -> backend and of the chosen files' contents; ranks compare it before they train."""
    digest = hashlib.sha256()
    for op in scan():
        backend = resolve(op).backend
        digest.update(f"{op}={backend}\n".encode())
        digest.update((ROOT / op / f"{backend}.py").read_bytes())
    return digest.hexdigest()[:16]


def _functions(op: str, backend: str) -> dict[str, Callable]:
    module = import_module(f"ops.{op}.{backend}")
    return {name: getattr(module, name) for name in import_module(f"ops.{op}").__all__}
