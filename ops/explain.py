"""What the op table says of itself: rows for people, the table that runs and checkpoints keep, its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Optional

from ops import registry
from ops.device import EnvFacts
from ops.discover import ROOT, catalog, descriptors, scan
from ops.select import is_emulated, platform, refusal


def rows(facts: Optional[EnvFacts] = None) -> list[tuple[str, str, str, str]]:
    """(op, backend, "chosen", "emulated" or "", reason) for every op x backend."""
    facts = facts or registry.collect()
    known = descriptors()
    result = []
    for op, files in scan().items():
        chosen = registry.resolve(op)
        for name in known:
            problem = refusal(
                name, files=files, facts=facts, backends=known, why_not=lambda n, o=op: registry.why_not(o, known[n])
            )
            mark = ("emulated" if chosen.emulated else "chosen") if name == chosen.backend else ""
            result.append((op, name, mark, _reason(chosen) if mark else problem or "available"))
    return result


def table() -> dict[str, dict]:
    """op -> backend, reason and, where they apply, tune, emulated, allow_reference, refused; and the machine's own
    backend under "platform": what env.json and checkpoints keep."""
    result = {}
    for op in scan():
        choice = registry.resolve(op)
        entry = {"backend": choice.backend, "reason": choice.reason}
        entry |= {"tune": dict(choice.tune)} if choice.tune else {}
        entry |= {key: True for key in ("emulated", "allow_reference") if getattr(choice, key)}
        refused = sorted(reason for refused_op, reason in registry.TABLE.refused if refused_op == op)
        result[op] = {**entry, "refused": refused} if refused else entry
    facts, known = registry.collect(), descriptors()
    name, reason = platform(facts, known)
    result["platform"] = {"backend": name, "reason": reason}
    result["platform"] |= {"emulated": True} if is_emulated(name, facts, known) else {}
    return result


def table_hash() -> str:
    """Hash of the choices, of the contents of the files that they run, and of their tune entries; ranks compare it.

    Where packages are installed has no part in it.
    """
    digest = hashlib.sha256()
    for path in sorted(ROOT.glob("*.py")):  # what implementations share
        digest.update(path.read_bytes())
    for op in scan():
        choice = registry.resolve(op)
        facts = [op, choice.backend, choice.emulated, choice.allow_reference, choice.tune]
        digest.update(json.dumps(facts, sort_keys=True).encode())
        others = set(descriptors()) - {choice.backend, "reference"}
        files = catalog().files[op]
        run = (files[name] for name in ("reference", choice.backend))
        for _, folder in sorted({(file.module.rpartition(".")[0], file.path.parent) for file in run}):
            for path in sorted(path for path in folder.glob("*.py") if path.stem not in others):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def lines() -> list[str]:
    """The table for a run's first page: one line for each backend and reason, then the hash."""
    groups: dict[tuple, list] = {}
    for op in scan():
        choice = registry.resolve(op)
        mark = f" [{', '.join(choice.tune['models'])}]" if choice.tune else ""
        groups.setdefault((choice.backend, _reason(choice, tune=False)), []).append(op + mark)
    told = [f"ops on {backend} ({reason}): {', '.join(names)}" for (backend, reason), names in groups.items()]
    return [*told, f"ops table {table_hash()}"]


def _reason(choice: registry.Choice, *, tune: bool = True) -> str:
    notes = [choice.reason]
    if choice.tune and tune:
        status = f", {' and '.join(choice.tune['status'])}" if "status" in choice.tune else ""
        notes.append(f"tiles of {', '.join(choice.tune['models'])}{status} ({choice.tune['hash']})")
    if choice.allow_reference and choice.backend != "reference":
        notes.append("refused calls run on the reference")
    return "; ".join(notes)
