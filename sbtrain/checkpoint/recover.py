"""Where a run goes on: its newest checkpoint that is as it was written, and a ledger that says so.

A checkpoint that is damaged is skipped, with a line that says why. One that a host cannot read is not called damaged:
going back for days is not what anybody wants from a bad mount; the start ends with a line that names the host. A ledger
that is gone or damaged is made again from the checkpoints.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from parallel.collectives import together
from parallel.place import primitive
from sbtrain.checkpoint.ledger import Ledger, empty
from sbtrain.checkpoint.manifest import GONE, LAG_S, LOOK_S, ONE_FOLDER, Unreadable, delete, fault
from sbtrain.checkpoint.reading import read_state


@dataclass(frozen=True)
class Recovered:
    """ledger: where the run goes on. lines: what a user must know. damaged: folders that were skipped."""

    ledger: Ledger
    lines: list[str] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)

    def settle(self) -> None:
        """Print the lines and write the ledger, if there is anything to say. Called on rank 0. Raises OSError.

        Damaged checkpoints make room for good ones of their step: they are kept as step_N.damaged until the next
        checkpoint is saved.
        """
        if not self.lines:
            return
        print("\n".join(self.lines), flush=True)
        for folder in self.damaged:
            aside = folder.with_name(f"{folder.name}.damaged")
            delete(aside)
            folder.rename(aside)
        if self.ledger.checkpoint is not None:
            self.ledger.record_checkpoint(self.ledger.value["checkpoint"], self.ledger.step, write=True)


def recover(run_dir: Path, stages: dict[str, int]) -> Recovered:
    """The newest checkpoint that its manifest confirms, and the stages done by then. Collective; writes nothing.

    stages: budgets in tokens by name, in their order. All ranks share the reading. Raises ValueError where there are
    checkpoints and none can be used, where the one to use is of another version, or where the ranks do not see the
    same files, or one of them cannot read (Unreadable).
    """
    value, lines = together(lambda: _from_first(lambda: _read(run_dir)))
    steps = together(lambda: _from_first(lambda: candidates(run_dir, value)))
    damaged = []
    for step in steps:
        folder = run_dir / "checkpoints" / f"step_{step}"
        problem = _shared_fault(folder)
        if problem is None:
            content = together(lambda folder=folder: _from_first(lambda: read_state(folder)))
            there = {**(value or {}), **_value_at(step, content, value, stages)}
            if value is None:
                lines = [*lines, f"it is made again from checkpoints/step_{step}"]
            elif not damaged and there["stages_done"] != value["stages_done"]:
                lines = [*lines, _other_stages(folder, content, value, there)]
            return Recovered(Ledger(run_dir, there), lines, damaged)
        lines = [*lines, f"skipped {folder}: {problem}"]
        damaged += [folder] if problem != GONE else []
    if steps:
        raise ValueError(
            f"no checkpoint of {run_dir} can be used ({'; '.join(lines)}); put a copy of one there or choose another "
            "run_dir to begin again"
        )
    return Recovered(Ledger(run_dir, value or empty()), lines)


def candidates(run_dir: Path, value: dict | None) -> list[int]:
    """Steps of the checkpoints that a run may go on from, newest first. value: what the ledger says, None for lost.

    What lies beyond the ledger's checkpoint is not among them: the run may have been taken back to an earlier one.
    """
    there = step_folders(run_dir)
    if value is None:
        return there
    if value["checkpoint"] is None:
        return []
    named = Ledger(run_dir, value).step
    return [named, *(step for step in there if step < named)]


def step_folders(run_dir: Path) -> list[int]:
    """Steps N of all folders checkpoints/step_N, newest first. Raises OSError where they cannot be listed."""
    folder = run_dir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []  # glob gives nothing where a folder cannot be read
    numbers = {name: name.removeprefix("step_") for name in names if name.startswith("step_")}
    there = [int(number) for name, number in numbers.items() if number.isdecimal() and (folder / name).is_dir()]
    return sorted(there, reverse=True)


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files have the sizes of its manifest, for those who only read. One process.

    None where there is no checkpoint. Raises ValueError where there are some and none is whole.
    """
    value, _ = _read(run_dir)
    problems = []
    for step in candidates(run_dir, value):
        folder = run_dir / "checkpoints" / f"step_{step}"
        problem = fault(folder, deep=False)
        if problem is None:
            return folder
        problems.append(f"{folder.name}: {problem}")
    if problems:
        raise ValueError(f"run={run_dir} has no checkpoint that is whole ({'; '.join(problems)}); copy one back")
    return None


def _read(run_dir: Path) -> tuple[dict | None, list[str]]:
    """The ledger's content; None, and a line where there is one to say, if it is lost and there are checkpoints."""
    path = run_dir / "ledger.json"
    try:
        if path.exists() or not step_folders(run_dir):
            return Ledger(run_dir).value, []
        return None, [f"{path} is missing"]
    except ValueError as error:
        return None, [str(error).split("; ")[0]]


def _value_at(step: int, content: dict, value: dict | None, stages: dict[str, int]) -> dict:
    """What the ledger says at a checkpoint, whatever it said of stages.

    Stages before the checkpoint's are done. Its own is only where a ledger said so: a stage that has spent its budget
    may still have to be judged, which costs no step. Others are not: whoever goes back by hand changes one line.
    """
    order, stage = list(stages), content["stage"]
    done = order[: order.index(stage)] if stage in order else []
    if value and stage in value["stages_done"] and content["stage_tokens"] >= stages.get(stage, 0):
        done.append(stage)
    return {"stages_done": done, "checkpoint": f"checkpoints/step_{step}", "step": step}


def _other_stages(folder: Path, content: dict, value: dict, there: dict) -> str:
    done = [", ".join(each["stages_done"]) or "none" for each in (value, there)]
    return f"{folder} is of stage {content['stage']}: ledger.json calls done {done[0]}; the run goes on with {done[1]}"


def _shared_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, each rank reading its share of the files. Collective.

    Raises ValueError, on all ranks, where some ranks miss what others see or cannot read it: that is no fault of the
    checkpoint.
    """
    problem = _seen(folder, deep=False)
    problems = _of_all(problem)
    if not all(problems) and any(problems):
        end = time.monotonic() + LAG_S
        while problem and time.monotonic() < end:
            time.sleep(LOOK_S)
            problem = _seen(folder, deep=False)
        problems = _of_all(problem)
    _check_readable(problems)
    if all(problems):
        return problems[0]
    for rank, (problem, host) in enumerate(zip(problems, _of_all(platform.node()))):
        if problem:
            raise ValueError(f"rank {rank} (host {host}) does not see {folder} as others do: {problem}; {ONE_FOLDER}")
    problems = _of_all(_seen(folder, rank=dist.get_rank(), num_ranks=dist.get_world_size()))
    _check_readable(problems)
    return next((problem for problem in problems if problem), None)


def _seen(folder: Path, **how) -> str | Unreadable | None:
    """What is wrong with it as this rank sees it, or why it cannot tell."""
    try:
        return fault(folder, **how)
    except Unreadable as error:
        return error


def _check_readable(problems: list[str | Unreadable | None]) -> None:
    """Raise Unreadable, naming the first rank that cannot read. problems: by rank, the same on all of them."""
    unread = [rank for rank, problem in enumerate(problems) if isinstance(problem, Unreadable)]
    if unread:
        others = f", and so {len(unread) - 1} more of {len(problems)} ranks" if unread[1:] else ""
        raise Unreadable(f"rank {unread[0]}{others}: {problems[unread[0]]}")


def _of_all(ours) -> list:
    """What every rank has. Collective."""
    everyone = [None] * dist.get_world_size()
    with primitive("verification of a checkpoint"):
        dist.all_gather_object(everyone, ours)
    return everyone


def _from_first(call):
    """What call() gives on rank 0, on every rank: file systems do not show all hosts the same at once."""
    result = [None]
    try:
        if dist.get_rank() == 0:
            result = [call()]
    finally:
        with primitive("where the run goes on"):
            dist.broadcast_object_list(result, src=0)
    return result[0]
