"""Ledger: which stages of a run are done and which checkpoint is newest. What a requeued job reads first."""

from __future__ import annotations

import re
from pathlib import Path

from sbtrain.checkpoint.files import read_json, write_json

_NAME = re.compile(r"checkpoints/step_\d{1,18}")


class Ledger:
    """ledger.json of a run directory. Every rank reads it; only rank 0 writes."""

    def __init__(self, run_dir: Path, value: dict | None = None):
        """value: the content, where it is known. Raises ValueError naming the file where it is damaged."""
        self.path = run_dir / "ledger.json"
        if value is None:
            value = read_json(self.path) if self.path.exists() else empty()
            _check(self.path, value)
        self._value = value

    @property
    def value(self) -> dict:
        """The content of the file."""
        return self._value

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the newest checkpoint, or None."""
        name = self._value["checkpoint"]
        return None if name is None else self.path.parent / name

    @property
    def step(self) -> int:
        """Step of the newest checkpoint, 0 without one; its name counts, so that a user may point at another one."""
        name = self._value["checkpoint"]
        return 0 if name is None else int(name.rsplit("_", 1)[1])

    @property
    def stages_done(self) -> list[str]:
        """The stages that have spent their budgets."""
        return self._value["stages_done"]

    @property
    def rolled_back(self) -> dict | None:
        """A RunState at the newest checkpoint's step that counts instead of the checkpoint's, see record_rollback."""
        state = self._value.get("rolled_back")
        return state if isinstance(state, dict) and state.get("step") == self.step else None

    def is_done(self, stage: str) -> bool:
        """Whether a stage has spent its budget."""
        return stage in self._value["stages_done"]

    def unfinished(self, stages: list[str]) -> list[str]:
        """The stages still to run, in order."""
        return [stage for stage in stages if stage not in self._value["stages_done"]]

    def record_checkpoint(self, name: str, step: int, *, write: bool) -> None:
        """Call `checkpoints/step_N` the newest. write: on rank 0."""
        if name != self._value["checkpoint"]:
            self._value = {key: part for key, part in self._value.items() if key != "rolled_back"}
        self._change(write, checkpoint=name, step=step)

    def record_rollback(self, state: dict, *, write: bool) -> None:
        """Keep that the run went back to the newest checkpoint and goes on with other samples. write: on rank 0."""
        self._change(write, rolled_back=state)

    def finish(self, stage: str, *, write: bool) -> None:
        """Mark a stage as done. write: on rank 0."""
        self._change(write, stages_done=[*self._value["stages_done"], stage])

    def record_clocks(self, skews_s: dict[str, float], *, write: bool) -> None:
        """Keep how far each host's clock is from their median, in seconds. write: on rank 0."""
        self._change(write, clock_skew_s=skews_s)

    def _change(self, write: bool, **changes) -> None:
        self._value = {**self._value, **changes}
        if write:
            write_json(self.path, self._value)


def empty() -> dict:
    """What the ledger of a run that has nothing yet says."""
    return {"stages_done": [], "checkpoint": None, "step": 0}


def _check(path: Path, value) -> None:
    """Raise ValueError, in one line, for a content that is not a ledger's or whose checkpoint lies elsewhere."""
    missing = {"stages_done", "checkpoint", "step"} - set(value if isinstance(value, dict) else ())
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}; restore it from a copy or choose another run_dir")
    name, stages = value["checkpoint"], value["stages_done"]
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"{path} names {name!r}, which is no checkpoints/step_N of this run; name one of these")
    if not (isinstance(stages, list) and all(isinstance(stage, str) for stage in stages)):
        raise ValueError(f"{path}: stages_done is no list of names; restore it from a copy or choose another run_dir")
