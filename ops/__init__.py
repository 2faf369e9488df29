"""The op layer: every operator of the models as one public function, `ops.gla(...)`, whatever the machine.

One folder per operator: `__init__.py` (signature, shapes, tolerances), `reference.py` (plain torch, any device) and
optional files named after the backends in `ops/backends/`. Folders and backends are found by scanning, so a new one
needs no edit here. `python -m ops` prints which implementation runs and why the others do not.

Layout everywhere: B batch rows, T tokens, H heads, K and V head dimensions: [B, T, H, K]. Queries may have more heads
than keys and values; query head h then uses key head h // (Hq / Hkv).
"""

from importlib import import_module

from ops.registry import Choice, resolve, scan, table, table_hash, use

__all__ = ["Choice", "resolve", "table", "table_hash", "use"]

for _op in scan():
    _package = import_module(f"ops.{_op}")
    globals().update({_name: getattr(_package, _name) for _name in _package.__all__})
    __all__ += _package.__all__
