"""Which ops and backends there are, found by scanning folders. Of what is found, only descriptors are imported here.

A root is a package laid out like this one: a folder for each op, named after it, and `backends/`. Ours is `ops`. Others
come from the entry-point group `sbtrain.ops` of installed distributions and from OPS_MODULES: they may add ops (a
folder with `__init__.py` and `reference.py`), backends, and files for a backend beside an op that is there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Mapping

from ops.backends import Backend
from ops.device import outside_packages

ROOT = Path(__file__).parent
ENTRY_POINTS = "sbtrain.ops"
BACKENDS = "backends"


@dataclass(frozen=True)
class File:
    """A module that was found and not imported."""

    module: str
    path: Path


@dataclass(frozen=True)
class Catalog:
    """packages: op -> the package of its public functions. files: op -> backend -> implementation. backends: name ->
    descriptor."""

    packages: Mapping[str, str]
    files: Mapping[str, Mapping[str, File]]
    backends: Mapping[str, File]


@lru_cache(maxsize=1)
def catalog() -> Catalog:
    """Everything that this process can choose from. Raises ValueError as `search` does."""
    return search(roots())


@lru_cache(maxsize=1)
def descriptors() -> dict[str, Backend]:
    """Descriptor of every backend, in probe order. Raises ValueError for one that is not named like its file."""
    found = {name: import_module(file.module).BACKEND for name, file in catalog().backends.items()}
    for name, backend in found.items():
        if backend.name != name:
            path = catalog().backends[name].path
            raise ValueError(f"{path}: BACKEND.name is {backend.name!r}; make it {name!r}, like the file's name")
    return dict(sorted(found.items(), key=lambda item: item[1].rank))


def roots() -> dict[str, Path]:
    """package -> folder: ours, then outsiders. Raises ValueError for a package that is not there."""
    found = {"ops": ROOT}
    asked = [
        (f"entry point {point.name} of {ENTRY_POINTS}", point.module) for point in entry_points(group=ENTRY_POINTS)
    ]
    asked += [("OPS_MODULES", name) for name in outside_packages()]
    for source, name in asked:
        found[name] = _folder(source, name)
    return found


def search(roots: Mapping[str, Path]) -> Catalog:
    """The catalog of these roots. Raises ValueError when two files claim one (op, backend) or one backend, and for a
    backend's file beside no op."""
    backends: dict[str, File] = {}
    for package, folder in roots.items():
        for path in sorted((folder / BACKENDS).glob("*.py")):
            if path.stem != "__init__":
                _add(backends, path.stem, File(f"{package}.{BACKENDS}.{path.stem}", path), f"backend {path.stem}")
    packages: dict[str, str] = {}
    files: dict[str, dict[str, File]] = {}
    for package, folder in roots.items():
        for path in sorted(folder.glob("*/*.py")):
            op, backend = path.parent.name, path.stem
            if op == BACKENDS or backend not in backends:
                continue
            if backend == "reference" and (path.parent / "__init__.py").exists():
                packages.setdefault(op, f"{package}.{op}")
            _add(files.setdefault(op, {}), backend, File(f"{package}.{op}.{backend}", path), f"op {op} on {backend}")
    for op in sorted(set(files) - set(packages)):
        stray = next(iter(files[op].values())).path
        raise ValueError(
            f"{stray} belongs to no op: there is no {op} with __init__.py and reference.py; rename the folder"
        )
    return Catalog(packages, {op: files[op] for op in sorted(packages)}, backends)


def scan(root: Path | None = None) -> dict[str, frozenset]:
    """op -> backends that have a file for it, of this process or of one folder."""
    found = catalog() if root is None else search({"ops": root})
    return {op: frozenset(files) for op, files in found.files.items()}


def _folder(source: str, name: str) -> Path:
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{source}: there is no package {name}; install it or correct the name")
    return Path(next(iter(spec.submodule_search_locations)))


def _add(known: dict, key: str, file: File, what: str) -> None:
    if key in known:
        raise ValueError(f"{what} is there twice, in {known[key].path} and {file.path}; remove one")
    known[key] = file
