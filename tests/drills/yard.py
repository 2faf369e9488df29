"""Where drills are held: starts a job, has its fault happen, starts the same command again, and judges every end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drills.drill import DUE, LAYOUTS, STEPS, Drill, job
from drills.template import Template
from run_case import write_inputs
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.manifest import MANIFEST, fault
from sbtrain.checkpoint.recover import step_folders
from sbtrain.convert.reader import CheckpointReader

DISK = "16m"
FIELDS = ("step", "tokens", "stage", "loss", "grad_norm", "lr")
LEFT = {"kill_one": 76, "sigterm": 75, "corrupt": 2, "fill": 2}
"""Exit code of ranks that are not killed."""


class Yard:
    """A folder for drills, with the undisturbed run of every layout."""

    def __init__(self, root: Path, template: Template):
        self.root, self.template = root, template
        self._references: dict[str, Path] = {}
        write_inputs(root)

    def reference(self, layout: str) -> Path:
        """Run directory of the undisturbed run; it keeps the checkpoint of every step."""
        if layout not in self._references:
            num_ranks, name = LAYOUTS[layout][0], layout.replace(" ", "_")
            run_dir = self.root / name
            saving = ["checkpoint.every_steps=1", "checkpoint.keep_last=0"]
            args = [f"recipe={self.root / 'tiny.yaml'}", f"run_dir={run_dir}", *job(layout), *saving]
            ends = self.template.start(num_ranks, self.root / f"{name}.out", args)
            assert ends["codes"] == [0] * num_ranks, "\n".join(ends["texts"])
            records = steps_of(run_dir)
            assert len(records) == STEPS == len(step_folders(run_dir)) and records[0][3] != records[-1][3]
            self._references[layout] = run_dir
        return self._references[layout]

    def survive(self, drill: Drill) -> str:
        """Hold a drill. Returns a line that says what happened; raises AssertionError where something is wrong."""
        reference = self.reference(drill.layout)
        folder = self.root / f"drill_{drill.seed}"
        folder.mkdir()
        write_inputs(folder)
        with SmallDisk(folder / "disk") if drill.kind == "fill" else Anywhere(folder / "disk") as disk:
            line = _Story(self, drill, folder, disk / "run", reference).tell()
        shutil.rmtree(folder)
        return line


class Anywhere:
    """A context with a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *exc) -> None:
        pass


class SmallDisk(Anywhere):
    """A context with a file system of its own that is soon full. Skips the test where none may be mounted."""

    def __enter__(self) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
        return self.folder

    def __exit__(self, *exc) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class _Story:
    """One drill from its first start to its end."""

    def __init__(self, yard: Yard, drill: Drill, folder: Path, run_dir: Path, reference: Path):
        self.drill, self.folder, self.run_dir, self.reference = drill, folder, run_dir, reference
        self._template, self._whole, self._num_starts = yard.template, steps_of(reference), 0
        self._shard, self._ballast = folder / f"{drill.shard}.bin", folder / "disk" / "ballast"

    def tell(self) -> str:
        kind, sound = self.drill.kind, self._shard.read_bytes()
        ends = self._start(self._fault())
        assert len(ends["fault"]) == (2 if kind == "sigterm" else 1), f"it did not happen: {ends}"
        getattr(self, f"_check_{kind}")(ends)
        self._check_state(torn=True)
        if kind in ("fill", "corrupt"):
            getattr(self, f"_check_{kind}")(self._start())  # it says so again, and does no harm
            self._check_state(torn=True)
            self._ballast.unlink(missing_ok=True)
            self._shard.write_bytes(sound)
        harm = getattr(self, f"_harm_{kind}", lambda: (self._newest_step(), []))
        step, said = harm()
        before = lines_of(self.run_dir, torn=True)
        self._check_end(self._start(), said)
        after = lines_of(self.run_dir)
        assert after[:step] == before[:step], "steps before the checkpoint were trained again"
        assert not set(after[step:]) & set(before[step:]), "the run did not go on from the checkpoint"
        return f"{self.drill}; {' and '.join(ends['fault'])}: codes {ends['codes']}, gone on from step {step}"

    def _fault(self):
        """With amounts in bytes."""
        found = self.drill.fault
        if self.drill.kind == "fill":
            smallest = min(_num_bytes(self.reference / f"checkpoints/step_{step}") for step in (1, STEPS))
            found = replace(found, amount=int(0.9 * self.drill.share * smallest) if found.amount else 0)
        return found

    def _start(self, happens=None) -> dict:
        """The same command, each time."""
        self._num_starts += 1
        args = [f"recipe={self.folder / 'tiny.yaml'}", f"run_dir={self.run_dir}", *self.drill.arguments()]
        places = dict(run_dir=self.run_dir, ballast=self._ballast, shard=self._shard)
        out = self.folder / f"start_{self._num_starts}"
        ends = self._template.start(self.drill.num_ranks, out, args, fault=happens, **places)
        ends["errors"] = [line for text in ends["texts"] for line in text.splitlines() if line.startswith("error: ")]
        assert not any("Traceback" in text for text in ends["texts"]), "\n".join(ends["texts"])
        assert not any(ends["left"]), f"processes are left: {ends['left']}"
        return ends

    def _check_kill_one(self, ends: dict) -> None:
        """The others name the rank."""
        bad = self.drill.fault.rank
        expected = [-9 if rank == bad else LEFT["kill_one"] for rank in range(self.drill.num_ranks)]
        assert ends["codes"] == expected, ends
        (line,) = ends["errors"]
        assert line.startswith(f"error: rank {bad} (host ") and "start the same command again" in line, line
        assert self._exit() == {"code": 76, "reason": line.removeprefix("error: ")}
        self._check_progress()

    def _check_kill_all(self, ends: dict) -> None:
        assert ends["codes"] == [-9] * self.drill.num_ranks and not ends["errors"], ends
        assert self._exit() is None
        self._check_progress()

    def _check_truncate(self, ends: dict) -> None:
        self._check_kill_all(ends)

    def _check_lose_ledger(self, ends: dict) -> None:
        assert ends["codes"] == [-9] * self.drill.num_ranks and not ends["errors"], ends
        assert not (self.run_dir / "ledger.json").exists()

    def _check_sigterm(self, ends: dict) -> None:
        """The step that it came in is saved, or was the last."""
        codes, step = set(ends["codes"]), Ledger(self.run_dir).step
        assert codes <= ({LEFT["sigterm"]} if step < STEPS else {LEFT["sigterm"], 0}) and not ends["errors"], ends
        assert self._exit()["code"] in codes and (step == STEPS or "SIGTERM" in self._exit()["reason"]), self._exit()
        assert step == len(steps_of(self.run_dir)), "the newest step is saved"

    def _check_fill(self, ends: dict) -> None:
        self._check_refusal(ends, str(self.run_dir))
        parts = list((self.run_dir / "checkpoints").glob("*.partial"))
        in_save = "/checkpoints" in ends["errors"][0]  # else something else ended a save in the background
        assert not parts or (self.drill.asynchronous and not in_save), f"a part of a checkpoint is left: {parts}"

    def _check_corrupt(self, ends: dict) -> None:
        self._check_refusal(ends, str(self._shard))

    def _check_refusal(self, ends: dict, path: str) -> None:
        """One line, which names the file; exit.json says the same, if there is room for it and a run yet."""
        assert ends["codes"] == [2] * self.drill.num_ranks, ends
        (line,) = ends["errors"]
        assert path in line, line
        if self.drill.kind == "corrupt" and self.drill.fault.step:
            assert self._exit() is not None
        assert self._exit() in (None, {"code": 2, "reason": line.removeprefix("error: ")}), (line, self._exit())

    def _check_progress(self) -> None:
        """What was due at a step that was done is saved, where training waits for it."""
        due = [step for step in DUE if step < self.drill.fault.step and not self.drill.asynchronous]
        assert Ledger(self.run_dir).step >= max(due, default=0)

    def _check_state(self, *, torn: bool = False) -> None:
        """Whatever has the name of a checkpoint is one; the newest is what the undisturbed run had at that step."""
        done = steps_of(self.run_dir, torn=torn)
        assert done == self._whole[: len(done)], "a step was trained otherwise than it should be"
        for step in step_folders(self.run_dir):
            folder = self.run_dir / f"checkpoints/step_{step}"
            assert fault(folder) is None, f"{folder}: {fault(folder)}"
        newest = Ledger(self.run_dir).checkpoint
        if newest is not None:
            check_same(newest, self.reference / "checkpoints" / newest.name)

    def _harm_truncate(self) -> tuple[int, list[str]]:
        """Cut a file of the newest checkpoint. Returns the step that is the newest then, and what is to be said."""
        ledger = Ledger(self.run_dir)
        files = sorted(ledger.checkpoint.iterdir())
        path = files[int(self.drill.share * len(files))]
        num_bytes = path.stat().st_size
        stays = self.drill.fault.amount * num_bytes // 40
        os.truncate(path, stays)
        says = f"{path.name} has {stays} bytes, not the {num_bytes}" if path.name != MANIFEST else MANIFEST
        before = max(step for step in step_folders(self.run_dir) if step < ledger.step)
        return before, [f"skipped {ledger.checkpoint}: {says}"]

    def _newest_step(self) -> int:
        """Where the next start goes on: where the ledger says; where there is none yet, at the newest checkpoint."""
        found = step_folders(self.run_dir)
        return Ledger(self.run_dir).step if (self.run_dir / "ledger.json").exists() or not found else found[0]

    def _harm_lose_ledger(self) -> tuple[int, list[str]]:
        """It is lost already."""
        step = step_folders(self.run_dir)[0]
        return step, [f"{self.run_dir / 'ledger.json'} is missing", f"it is made again from checkpoints/step_{step}"]

    def _check_end(self, ends: dict, said: list[str]) -> None:
        """As if nothing had been; only what had to be said was said."""
        assert ends["codes"] == [0] * self.drill.num_ranks and not ends["errors"], "\n".join(ends["texts"])
        text = "".join(ends["texts"])
        assert all(text.count(line) == 1 for line in said), text
        assert ("skipped" in text) == (self.drill.kind == "truncate"), text
        self._check_state()
        assert steps_of(self.run_dir) == self._whole
        ledger = Ledger(self.run_dir)
        assert ledger.step == STEPS and ledger.stages_done == ["ctx_32", "ctx_64"]
        there = {path.name for path in (self.run_dir / "checkpoints").iterdir()}
        assert all(re.fullmatch(r"step_\d+", name) for name in there) and len(there) == 2, there
        assert self._exit()["code"] == 0 and not (self.run_dir / "lock.json").exists()

    def _exit(self) -> dict | None:
        path = self.run_dir / "exit.json"
        return json.loads(path.read_text()) if path.exists() else None


def lines_of(run_dir: Path, *, torn: bool = False) -> list[str]:
    """Of metrics.jsonl. torn: the last one may not be whole, and is left out then."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return lines[:-1] if torn and lines and not lines[-1].endswith("\n") else lines


def steps_of(run_dir: Path, *, torn: bool = False) -> list[tuple]:
    """What makes the steps of metrics.jsonl; see lines_of."""
    return [tuple(json.loads(line)[key] for key in FIELDS) for line in lines_of(run_dir, torn=torn)]


def check_same(ours: Path, theirs: Path) -> None:
    """Every tensor of a checkpoint, weights and moments, is another one's to the last bit."""
    readers = CheckpointReader(ours), CheckpointReader(theirs)
    names = readers[0].names()
    assert names == readers[1].names() and any("exp_avg_sq" in name for name in names)
    for name in names:
        assert torch.equal(readers[0].get(name), readers[1].get(name)), f"{ours.name}: {name}"


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
