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
from sbtrain.inference import bits, harness, passkey
from sbtrain.inference.load import Where, load_model
from sbtrain.inference.options import build, check_keys, split


@dataclass(frozen=True)
class Suite:
    """options: a dataclass, its fields are keys. table(report): for the terminal.

    check(where, options): what can be refused before a model is loaded. run(loaded, options) -> report, or
    run(where, options) with loads_model=False. plot(report, path): writes a PNG.
    """

    options: type
    run: Callable[[Any, Any], dict]
    table: Callable[[dict], str]
    check: Callable[[Where, Any], None] = lambda where, options: None
    plot: Callable[[dict, Path], None] | None = None
    loads_model: bool = True


SUITES = {
    "bpb": Suite(bits.BitsOptions, bits.run, bits.table, check=bits.check),
    "passkey": Suite(passkey.PasskeyOptions, passkey.run, passkey.table, plot=passkey.heat_map),
    "lm_eval": Suite(harness.HarnessOptions, harness.run, harness.table, check=harness.check, loads_model=False),
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
    ours = {name: suite for name, suite in suites.items() if suite.loads_model}
    if ours:
        with Mesh.build(Layout()) as mesh:
            loaded = load_model(where, mesh)
            for name, suite in ours.items():
                _finish(name, suite.run(loaded, options[name]), options[name], out, origin=loaded.origin)
        del loaded  # a suite that loads the model itself needs the memory
    for name in (name for name in suites if name not in ours):
        _finish(name, suites[name].run(where, options[name]), options[name], out, origin=where.folder)


def _finish(name: str, report: dict, options: Any, out: Path, *, origin: Path) -> None:
    """Print and keep the results of one suite."""
    suite = SUITES[name]
    print(f"\n{suite.table(report)}", flush=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{name}.json", {"suite": name, "model": str(origin), **asdict(options), **report})
        if suite.plot:
            suite.plot(report, out / f"{name}.png")
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"results cannot be written to {out} ({reason}); give out=FOLDER or free space") from None
    print(f"-> {out / name}.json{f', {out / name}.png' if suite.plot else ''}", flush=True)


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
