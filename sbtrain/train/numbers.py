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

from parallel.collectives import together
from sbtrain.checkpoint.state import RunState
from sbtrain.config.schema import OnSpike, WatchConfig
from sbtrain.metrics.sinks import open_jsonl

FILE, ROLLBACKS = "skipped_steps.jsonl", "rollbacks.jsonl"
LEAST_LOSSES = 20
"""Fewer say little of what is usual."""
_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median distance from the median."""
_LEAST_SPREAD = 1e-4
"""Of a loss, relative to the median: a loss that hardly moves has no spikes in its last digits."""


class Numbers:
    """What was usual in the last steps of a stage, and how many steps of the run were skipped."""

    def __init__(self, rules: WatchConfig, run_dir: str | Path):
        """run_dir: where FILE says which samples skipped steps had, ROLLBACKS which steps the run went back from."""
        self._rules, self._path, self._rollbacks_path = rules, Path(run_dir) / FILE, Path(run_dir) / ROLLBACKS
        self.spiked = False
        """Whether the newest step's loss is a spike that the run goes back from. Ranks may differ in rounding."""
        self.num_skipped = self.num_rollbacks = 0
        self._skipped: list[int] = []
        self._rollbacks: list[int] = []
        self._came_from: int | None = None
        self._stage, self._losses = "", deque(maxlen=rules.window_steps)

    def begin(self, state: RunState) -> None:
        """Go on from a restored state. Losses of another stage are not comparable and are forgotten. Collective.

        What the files say of later steps, which are done again, is dropped. Raises ValueError where they cannot be
        written.
        """
        self._take_over(state)
        self.num_rollbacks = (state.watch or {}).get("num_rollbacks", 0)
        self._rollbacks = list((state.watch or {}).get("rollbacks", []))
        self._came_from = (state.watch or {}).get("came_from")
        self._on_first(lambda: self._forget_later(state))

    def _take_over(self, state: RunState) -> None:
        kept = state.watch or {}
        self.spiked, self._came_from = False, None
        self.num_skipped, self._skipped = kept.get("num_skipped", 0), list(kept.get("skipped", []))
        losses = kept.get("losses", []) if kept.get("stage") == state.stage else []
        self._stage, self._losses = state.stage, deque(losses, maxlen=self._rules.window_steps)

    def _forget_later(self, state: RunState) -> None:
        if self._path.exists():
            open_jsonl(self._path, state.step + 1).close()
        if self._rollbacks_path.exists():
            open_jsonl(self._rollbacks_path, self.num_rollbacks + 1, key="rollback").close()

    def went_back_to(self, state: RunState) -> bool:
        """Whether the run has gone back to this state, or to one less than window_steps before it, already."""
        return any(step <= state.step for step in self._recent(self._rollbacks, state))

    def check_rollbacks(self, spiked: RunState, restored: RunState) -> None:
        """Raise ValueError, on all ranks, where the run may not go back once more, from spiked to restored.

        Rollbacks count by where they went to: the way from there to the spike may be longer than the window. Those that
        went farther count too: what lies behind them did not help.
        """
        recent = self._recent(self._rollbacks, restored)
        if len(recent) >= self._rules.max_rollbacks:
            raise ValueError(
                f"step {spiked.step} of stage {spiked.stage}: the loss has spiked again after {len(recent)} rollbacks "
                f"to step {restored.step}, less than {self._rules.window_steps} steps before it, or behind it, as many "
                f"as watch.max_rollbacks allows; {self._rollbacks_path} has their losses and samples, the newest "
                "checkpoint is intact; lower the stage's schedule.lr, look at the data, or set watch.on_spike=tell, "
                "and start again"
            )

    def go_back(self, spiked: RunState, restored: RunState, about: dict) -> None:
        """Go on from an earlier state, whose step's losses count again. Collective.

        spiked: the state that the run leaves. about: what ROLLBACKS says besides, on rank 0; elsewhere it is not read.
        Raises ValueError where that cannot be written.
        """
        self._rollbacks = [*self._recent(self._rollbacks, restored), restored.step]
        self.num_rollbacks += 1
        self._take_over(restored)
        self._came_from = spiked.step
        ends = {"rollback": self.num_rollbacks, "step": restored.step, "from_step": spiked.step}

        def write() -> None:
            self._forget_later(restored)
            file = open_jsonl(self._rollbacks_path, self.num_rollbacks, key="rollback")
            file.write({**ends, "stage": spiked.stage, **about})
            file.close()

        self._on_first(write)

    def _recent(self, steps: list[int], state: RunState) -> list[int]:
        return [step for step in steps if step > state.step - self._rules.window_steps]

    @staticmethod
    def _on_first(call: Callable[[], None]) -> None:
        """call() on rank 0; all ranks raise what it does not manage. Collective."""
        together(lambda: call() if dist.get_rank() == 0 else None)

    def state_dict(self) -> dict:
        """What begin needs, as JSON values, the same on every rank."""
        return {
            "num_skipped": self.num_skipped,
            "skipped": self._skipped,
            "num_rollbacks": self.num_rollbacks,
            "rollbacks": self._rollbacks,
            "came_from": self._came_from,
            "stage": self._stage,
            "losses": list(self._losses),
        }

    def check(self, state: RunState, *, loss: float, grad_norm: float, origin: Callable[[], dict] | None) -> dict:
        """What metrics.jsonl says of the step that led to state. Rank 0 prints what people should know.

        origin: where the step's batch came from; called where the step was skipped, on all ranks. Raises ValueError,
        on all ranks, when too many steps were skipped.
        """
        self.spiked, came_from = False, self._came_from
        self._came_from = None
        said = {"rollbacks": self.num_rollbacks} if self.num_rollbacks else {}
        said |= {} if came_from is None else {"rolled_back_from_step": came_from}
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip(state, loss, grad_norm, origin() if origin is not None else {})
            return {"skipped": True, "skipped_steps": self.num_skipped, **said}
        score = self._score(loss)
        if score is not None and 0 < self._rules.spike_score <= score:
            self.spiked = self._rules.on_spike is OnSpike.rollback
            _say(
                f"step {state.step} of stage {state.stage}: loss {loss:.4f} is a spike, {score:.1f} standard "
                f"deviations above {median(self._losses):.4f}, the median of {len(self._losses)} steps "
                f"(watch.spike_score={self._rules.spike_score:g})"
            )
        self._losses.append(loss)
        return {"loss_score": score, "skipped_steps": self.num_skipped, **said}

    def _score(self, loss: float) -> float | None:
        """Robust z-score: spikes among the steps that it is compared with change it little."""
        if len(self._losses) < min(LEAST_LOSSES, self._rules.window_steps):
            return None
        usual = median(self._losses)
        spread = _DEVIATION * median(abs(other - usual) for other in self._losses)
        return (loss - usual) / max(spread, _LEAST_SPREAD * abs(usual), 1e-12)

    def _skip(self, state: RunState, loss: float, grad_norm: float, origin: dict) -> None:
        self.num_skipped += 1
        self._skipped = [*self._recent(self._skipped, state), state.step]
        what = f"loss {loss}, gradient norm {grad_norm}"

        def write() -> None:
            file = open_jsonl(self._path, state.step)
            file.write(
                {"step": state.step, "stage": state.stage, "loss": str(loss), "grad_norm": str(grad_norm), **origin}
            )
            file.close()

        self._on_first(write)
        if len(self._skipped) > self._rules.max_skipped_steps:
            raise ValueError(
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
