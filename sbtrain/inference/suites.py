"""THE TABLE of evaluation suites, and the run of those that were asked for.

A new suite is a module with an options dataclass, run() and table(), and one row here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.checkpoint.files import write_json
from sbtrain.inference import bits, harness, passkey, spiking, spiking_plots, spiking_tables
from sbtrain.inference.load import Loaded, Where, load_model
from sbtrain.inference.options import build, check_keys, split


def _as_it_is(where: Where, options: Any, mesh: Mesh) -> Loaded:
    return load_model(where, mesh)


@dataclass(frozen=True)
class Suite:
    """options: a dataclass, its fields are keys. table(report): for the terminal.

    check(where, options): what can be refused before a model is loaded. run(loaded, options) -> report, or
    run(where, options) with load=None. load(where, options, mesh): the model; suites with the same function share one.
    plots(report, folder): writes PNG files, name -> path.
    """

    options: type
    run: Callable[[Any, Any], dict]
    table: Callable[[dict], str]
    check: Callable[[Where, Any], None] = lambda where, options: None
    plots: Callable[[dict, Path], dict[str, Path]] | None = None
    load: Callable[[Where, Any, Mesh], Loaded] | None = _as_it_is


SUITES = {
    "bpb": Suite(bits.BitsOptions, bits.run, bits.table, check=bits.check),
    "passkey": Suite(passkey.PasskeyOptions, passkey.run, passkey.table, plots=passkey.heat_map),
    "spiking": Suite(
        spiking.SpikingOptions,
        spiking.run,
        spiking_tables.table,
        check=spiking.check,
        plots=spiking_plots.write_spiking_plots,
        load=spiking.load,
    ),
    "lm_eval": Suite(harness.HarnessOptions, harness.run, harness.table, check=harness.check, load=None),
}


@dataclass(frozen=True)
class Choice:
    """suite: names from the table. out: folder for the results; empty is `evaluation` inside the model or run."""

    suite: tuple[str, ...] = ("bpb",)
    out: str = ""


def evaluate(arguments: Sequence[str]) -> None:
    """Run the suites that key=value arguments ask for; print a table and write SUITE.json for each.

    Raises ValueError, one line, before a model is loaded if the arguments alone are wrong.
    """
    given = split(arguments)
    choice = build(Choice, {key: value for key, value in given.items() if key in ("suite", "out")})
    if not choice.suite or set(choice.suite) - set(SUITES):
        unknown = next((name for name in choice.suite if name not in SUITES), "")
        raise ValueError(f"suite={unknown} does not exist; choose from {', '.join(SUITES)}")
    suites = {name: SUITES[name] for name in choice.suite}
    check_keys(given, Where, Choice, *(suite.options for suite in suites.values()))
    options = {name: build(suite.options, given) for name, suite in suites.items()}
    where = build(Where, given)
    where.check()
    out = _folder(choice.out, where)
    for name, suite in suites.items():
        suite.check(where, options[name])
    for load in dict.fromkeys(suite.load for suite in suites.values() if suite.load):
        _run_loaded({name: suite for name, suite in suites.items() if suite.load is load}, where, options, out)
    for name in (name for name, suite in suites.items() if not suite.load):
        _finish(name, suites[name].run(where, options[name]), options[name], out, where, origin=where.folder)


def _run_loaded(suites: dict[str, Suite], where: Where, options: dict[str, Any], out: Path) -> None:
    """Suites on one model, which is gone afterwards: the next ones need the memory."""
    with Mesh.build(Layout()) as mesh:
        first, suite = next(iter(suites.items()))
        loaded = suite.load(where, options[first], mesh)
        for name, suite in suites.items():
            _finish(name, suite.run(loaded, options[name]), options[name], out, where, origin=loaded.origin)


def _finish(name: str, report: dict, options: Any, out: Path, where: Where, *, origin: Path) -> None:
    """Print and keep the results of one suite."""
    suite = SUITES[name]
    print(f"\n{suite.table(report)}", flush=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        about = {"suite": name, "model": str(origin), "int8": where.int8}
        write_json(out / f"{name}.json", {**about, **asdict(options), **report})
        plots = suite.plots(report, out) if suite.plots else {}
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"results cannot be written to {out} ({reason}); give out=FOLDER or free space") from None
    print(f"-> {', '.join(map(str, [out / f'{name}.json', *plots.values()]))}", flush=True)


def _folder(out: str, where: Where) -> Path:
    """Where results go; checked to be writable, and made only when there are some."""
    if not where.folder.is_dir():
        key = "run" if where.run else "model"
        raise ValueError(f"{key}={where.folder} is not a folder; check the path")
    folder = Path(out) if out else where.folder / "evaluation"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"results cannot be written to {folder}; give out=FOLDER where they may go")
    return folder
