"""Numbers: judges the loss and gradient norm of every step: skipped steps are counted, spikes are told.

The engine has skipped a step whose numbers are not finite already, on all ranks (parallel.engine). What is remembered
here follows from numbers that all ranks have alike and goes into checkpoints, so a resumed run judges as an
uninterrupted one does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch.distributed as dist

from sbtrain.checkpoint.state import RunState
from sbtrain.config.schema import WatchConfig
from sbtrain.metrics.sinks import open_jsonl

FILE = "skipped_steps.jsonl"
LEAST_LOSSES = 20
"""Fewer say little of what is usual."""
_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median distance from the median."""
_LEAST_SPREAD = 1e-4
"""Of a loss, relative to the median: a loss that hardly moves has no spikes in its last digits."""


class Numbers:
    """What was usual in the last steps of a stage, and how many steps of the run were skipped."""

    def __init__(self, rules: WatchConfig, run_dir: str | Path):
        """run_dir: where FILE says which samples skipped steps had."""
        self._rules, self._path = rules, Path(run_dir) / FILE
        self.num_skipped = 0
        self._skipped: list[int] = []
        self._stage, self._losses = "", deque(maxlen=rules.window_steps)

    def begin(self, state: RunState) -> None:
        """Go on from a restored state. Losses of another stage are not comparable and are forgotten."""
        kept = state.watch or {}
        self.num_skipped, self._skipped = kept.get("num_skipped", 0), list(kept.get("skipped", []))
        losses = kept.get("losses", []) if kept.get("stage") == state.stage else []
        self._stage, self._losses = state.stage, deque(losses, maxlen=self._rules.window_steps)

    def state_dict(self) -> dict:
        """What begin needs, as JSON values, the same on every rank."""
        return {
            "num_skipped": self.num_skipped,
            "skipped": self._skipped,
            "stage": self._stage,
            "losses": list(self._losses),
        }

    def check(self, state: RunState, *, loss: float, grad_norm: float, origin: Callable[[], dict] | None) -> dict:
        """What metrics.jsonl says of the step that led to state. Rank 0 prints what people should know.

        origin: where the step's batch came from; called where the step was skipped, on all ranks. Raises
        ArithmeticError, on all ranks, when too many steps were skipped.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip(state, loss, grad_norm, origin() if origin is not None else {})
            return {"skipped": True, "skipped_steps": self.num_skipped}
        score = self._score(loss)
        if score is not None and 0 < self._rules.spike_score <= score:
            usual = median(self._losses)
            _say(
                f"step {state.step} of stage {state.stage}: loss {loss:.4f} is a spike, {score:.1f} standard "
                f"deviations above {usual:.4f}, the median of {len(self._losses)} steps"
            )
        self._losses.append(loss)
        return {"loss_score": score, "skipped_steps": self.num_skipped}

    def _score(self, loss: float) -> float | None:
        """Robust z-score: spikes among the steps that it is compared with change it little."""
        if len(self._losses) < min(LEAST_LOSSES, self._rules.window_steps):
            return None
        usual = median(self._losses)
        spread = _DEVIATION * median(abs(other - usual) for other in self._losses)
        return (loss - usual) / max(spread, _LEAST_SPREAD * abs(usual), 1e-12)

    def _skip(self, state: RunState, loss: float, grad_norm: float, origin: dict) -> None:
        self.num_skipped += 1
        first = state.step - self._rules.window_steps
        self._skipped = [step for step in self._skipped if step > first] + [state.step]
        what = f"loss {loss}, gradient norm {grad_norm}"
        if dist.is_initialized() and dist.get_rank() == 0:
            file = open_jsonl(self._path, state.step)  # drops what an earlier start wrote of this step and later ones
            file.write(
                {"step": state.step, "stage": state.stage, "loss": str(loss), "grad_norm": str(grad_norm), **origin}
            )
            file.close()
        if len(self._skipped) > self._rules.max_skipped_steps:
            raise ArithmeticError(
                f"step {state.step} of stage {state.stage}: {what}; {len(self._skipped)} of the last "
                f"{self._rules.window_steps} steps were skipped for such numbers, more than watch.max_skipped_steps="
                f"{self._rules.max_skipped_steps}; their samples are in {self._path}, the newest checkpoint is intact; "
                "lower the stage's schedule.lr and start again, or look at the data"
            )
        _say(
            f"step {state.step} of stage {state.stage}: {what}: skipped, no. {self.num_skipped} of the run; its "
            f"samples are in {self._path}"
        )


def _say(text: str) -> None:
    if dist.is_initialized() and dist.get_rank() == 0:
        print(f"warning: {text}", flush=True)
