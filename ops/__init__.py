"""The op layer: every operator of the models as one public function, `ops.gla(...)`, whatever the machine.

One folder per operator: `__init__.py` (signature, shapes, tolerances), `reference.py` (plain torch, any device) and
optional files named after the backends in `ops/backends/`. Folders and backends are found by scanning, so a new one
needs no edit here. `python -m ops` prints which implementation runs and why the others do not.

Layout everywhere: B batch rows, T tokens, H heads, K and V head dimensions: [B, T, H, K]. Queries may have more heads
than keys and values; query head h then uses key head h // (Hq / Hkv).
"""

from importlib import import_module

from ops.discover import BACKENDS, ROOT, catalog, scan
from ops.explain import lines, table, table_hash
from ops.registry import Choice, Refused, resolve, use

__all__ = ["Choice", "Refused", "lines", "resolve", "scan", "table", "table_hash", "use"]

_modules = {BACKENDS, *(_path.stem for _path in ROOT.glob("*.py"))}
for _op, _name in catalog().packages.items():
    _package = import_module(_name)
    _twice = sorted(set(_package.__all__) & (set(__all__) | _modules))
    if _twice:
        raise ValueError(f"{_name} calls a function {_twice[0]}, as ops or another op does; rename it")
    globals().update({_public: getattr(_package, _public) for _public in _package.__all__})
    __all__ += _package.__all__
