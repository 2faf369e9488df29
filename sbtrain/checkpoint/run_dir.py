"""The run directory: whose it is, and the files beside the checkpoints (recipe.yaml, env.json, exit.json)."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from enum import IntEnum
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import ops
from parallel import mcore
from parallel.mesh import start_distributed
from parallel.told import EXIT_CODE as STOPPED_CODE
from parallel.told import told
from parallel.watch import EXIT_CODE, RankWatch
from sbtrain.checkpoint.files import read_json, write_json
from sbtrain.checkpoint.lock import LOCK, RunLock
from sbtrain.checkpoint.manifest import fault
from sbtrain.checkpoint.recover import newest
from sbtrain.config.load import load, save
from sbtrain.config.schema import Recipe


class Exit(IntEnum):
    """Exit codes of the training process."""

    DONE = 0
    BAD_RECIPE = 2
    REQUEUE = STOPPED_CODE
    RANK_LOST = EXIT_CODE


FREE = (
    *("name", "run_dir", "cluster", "runtime", "watch", "log", "checkpoint", "evaluation", "ops", "export_dir"),
    *("dry_run", "layout_auto", "stop_after"),
)
"""Keys that may change when a run goes on."""
FREE_OF_STAGE = ("layout", "recompute", "experts", "micro_batch", "schedule", "num_nodes")
"""Keys of a stage that may change when a run goes on."""


SLURM = "slurm"
"""Folder of the run directory for what is submitted to Slurm: code, recipe, jobs, logs."""

OF_AN_END = ("exit.json", "stacks", LOCK, SLURM)
"""What is there before a start has become a run: of one that ended early, of one that waits."""


def run_folder(recipe: Recipe) -> Path:
    """Where the run lives."""
    return Path(recipe.run_dir)


def check_owner(recipe: Recipe) -> None:
    """Raise ValueError, naming the key, if the run directory holds a run that this recipe would not continue."""
    folder = run_folder(recipe)
    check_folder("run_dir", folder)
    path = folder / "recipe.yaml"
    if not path.exists():
        leftovers = list(folder.iterdir()) if folder.exists() else []
        if any(path.suffix != ".partial" and path.name not in OF_AN_END for path in leftovers):
            raise ValueError(f"run_dir={folder} is not empty and holds no recipe.yaml; choose a new run_dir")
        return
    there = load([f"recipe={path}", "dry_run=true"])
    theirs, ours = identity(there), identity(recipe)
    orders = [", ".join(stages) for stages in (there.stages, recipe.stages)]
    theirs["the order of stages"], ours["the order of stages"] = orders
    for key in sorted(set(theirs) | set(ours)):  # a stage too many is named before the order it changes
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"run_dir={folder} belongs to another recipe: {key} is {theirs.get(key, 'absent')} there and "
                f"{ours.get(key, 'absent')} here; choose another run_dir or restore the value"
            )


def check_folder(key: str, folder: str | Path) -> None:
    """Raise ValueError, naming the key, if the folder is a file or could not be made. "" is no folder and passes."""
    if not folder:
        return
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{key}={folder}: {existing} is a file; choose a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{key}={folder}: {existing} is not writable; choose another folder")


def open_run(run: str | Path, step: str = "") -> tuple[Recipe, Path]:
    """The recipe of a run directory and the folder of one of its checkpoints, by number; "" takes the newest.

    Its files have the sizes that its manifest says; what is in them was not compared. Nothing that the recipe names
    need exist any more. Raises ValueError naming run= or step=.
    """
    folder = Path(run)
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"run={run} is no run directory (no recipe.yaml); give the run_dir of a training run")
    recipe = load([f"recipe={folder / 'recipe.yaml'}", "dry_run=true"])
    step_dir = folder / "checkpoints" / f"step_{step}" if step else newest(folder)
    if step_dir is None:
        raise ValueError(f"run={run} has no checkpoint yet; train at least to the first one")
    if not step_dir.is_dir():
        there = ", ".join(sorted(path.name for path in (folder / "checkpoints").glob("step_*")))
        raise ValueError(f"step={step}: {step_dir} does not exist; there are: {there or 'none'}")
    problem = fault(step_dir, deep=False)
    if problem:
        raise ValueError(f"{step_dir} is damaged: {problem}; choose another with step=")
    return recipe, step_dir


def identity(recipe: Recipe) -> dict:
    """The values that make two recipes the same run, by dotted key."""
    value = {key: part for key, part in asdict(recipe).items() if key not in FREE}
    value["model"]["spiking"] = recipe.model.spiking.in_training()
    for stage in value["stages"].values():
        for key in FREE_OF_STAGE:
            del stage[key]
    return _flat(value)


def _flat(value, prefix: str = "") -> dict:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat = {}
    for key, part in value.items():
        flat.update(_flat(part, f"{prefix}.{key}" if prefix else key))
    return flat


def describe_run(recipe: Recipe) -> None:
    """Write recipe.yaml (resolved) and env.json, and forget how the last start ended. Called on rank 0.

    Raises ValueError where the run directory cannot be written.
    """
    folder = run_folder(recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "exit.json").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir={folder}: {error.strerror or error}; choose a writable folder") from None
    save(recipe, folder / "recipe.yaml")
    starts = _starts(folder)
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": mcore.PINNED,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "commit": _commit(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "ops": ops.table(),
        "ops_hash": ops.table_hash(),
        "starts": starts,
    }
    write_json(folder / "env.json", environment)


def record_start(run_dir: str | Path, start: dict) -> None:
    """Add to env.json how a stage is trained from now on; what starts from the same step or a later one is replaced.

    start: `step`, the last one that is done, and any JSON values. Those of earlier starts of the run stay. Called on
    rank 0, after describe_run.
    """
    folder = Path(run_dir)
    before = [other for other in _starts(folder) if other["step"] < start["step"]]
    write_json(folder / "env.json", {**read_json(folder / "env.json"), "starts": [*before, start]})


def _starts(folder: Path) -> list[dict]:
    """What the run recorded of its starts; nothing where env.json is not there or not whole, which stops no run."""
    try:
        return [start for start in read_json(folder / "env.json").get("starts", []) if "step" in start]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def record_exit(run_dir: str | Path, code: int, reason: str) -> None:
    """Write exit.json, which outlives torchrun's own exit code, if the run directory exists. Called by one rank."""
    folder = Path(run_dir)
    try:
        if folder.is_dir():
            write_json(folder / "exit.json", {"code": int(code), "reason": reason})
    except OSError as error:  # a full disk must not hide why the run ended, nor let an earlier end speak for this one
        with suppress(OSError):
            (folder / "exit.json").unlink(missing_ok=True)
        with suppress(OSError, ValueError):  # nobody reads any more
            print(f"{folder / 'exit.json'}: {error.strerror or error}", file=sys.stderr, flush=True)


def record_end(lock: RunLock, code: int, reason: str) -> None:
    """record_exit, unless the run directory is another job's, as far as any rank can tell alone. Raises nothing."""
    if not lock.is_anothers():
        record_exit(lock.run_dir, code, reason)


def watched(recipe: Recipe, lock: RunLock) -> RankWatch:
    """What ends this rank, and says why in exit.json, when another one is lost. Starts torch.distributed.

    From now on a signal that comes while no step is trained says so in exit.json too.
    """
    start_distributed(patience_s=recipe.runtime.patience_s, watched=True, deterministic=recipe.runtime.deterministic)
    record = partial(record_end, lock)
    told.record = record if dist.get_rank() == 0 else None
    return RankWatch(timeout_s=recipe.runtime.timeout_s, record=record, stacks=lock.run_dir / "stacks")


def _commit() -> str | None:
    """The checkout's commit, marked where it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if (root / "COMMIT").is_file():  # a frozen copy, which is no checkout
        return (root / "COMMIT").read_text().strip() or None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
