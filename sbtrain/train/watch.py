"""Watch: decides between steps whether to save and whether to stop: signals, intervals, broken numbers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.mesh import Mesh
from parallel.place import primitive
from parallel.told import SIGNALS, told
from sbtrain.checkpoint.flash import Flash
from sbtrain.checkpoint.state import RunState
from sbtrain.config.schema import WatchConfig
from sbtrain.train.health import Health
from sbtrain.train.numbers import Numbers


class Watch:
    """Catches SIGTERM, SIGINT and SIGUSR1 while it is open; a signal stops the run after the step it arrives in.

    Before the first step nothing is to be saved: a process that listens for itself (parallel.told) ends at once then.
    """

    def __init__(
        self,
        *,
        save_every_steps: int,
        device: torch.device,
        rules: WatchConfig | None = None,
        run_dir: str | Path = "",
        checkpoint_bytes: int = 0,
        keep_clocks: Callable[[dict[str, float]], None] | None = None,
        snapshot_every_steps: int = 0,
        writing: Flash | None = None,
    ):
        """rules: the recipe's; run_dir: where skipped steps are listed; the rest: see sbtrain.train.health.

        writing: whose flags travel with the signals, so that the ranks know when all have written.
        """
        rules = rules or WatchConfig()
        self.numbers = Numbers(rules, run_dir)
        self.health = Health(rules, run_dir, checkpoint_bytes=checkpoint_bytes, keep_clocks=keep_clocks)
        self.metrics: dict = {}
        """What metrics.jsonl says of the newest step that was checked."""
        self.spiked = False
        """Whether any rank saw a spike to go back from, when all were last asked (must_stop)."""
        self.save_every_steps, self._device = save_every_steps, device
        self.snapshot_every_steps, self._writing = snapshot_every_steps, writing
        self._signal: int | None = None
        self._previous: dict = {}

    def __enter__(self) -> Watch:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc) -> None:
        told.training = False
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self._signal = number

    @property
    def reason(self) -> str:
        """What stopped the run, for exit.json."""
        return "stopped by another rank" if self._signal is None else signal.Signals(self._signal).name

    def must_stop(self) -> bool:
        """Whether any rank was told to stop. Collective: all ranks get the same answer, and the same `spiked`.

        Raises what the writing of checkpoints raises.
        """
        ours = [self._signal is not None, self.numbers.spiked, *(self._writing.flags() if self._writing else ())]
        flags = torch.tensor(ours, dtype=torch.int32, device=self._device)
        with primitive("signals"):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            stop, spiked, *writing = flags.tolist()
        self.spiked = bool(spiked)
        if self._writing:
            self._writing.heard(writing)
        return bool(stop)

    def save_due(self, state: RunState) -> bool:
        """Whether the interval asks for a checkpoint after this step."""
        return self.save_every_steps > 0 and state.step % self.save_every_steps == 0

    def snapshot_due(self, state: RunState) -> bool:
        """Whether the interval asks for a snapshot in memory after this step."""
        return self.snapshot_every_steps > 0 and state.step % self.snapshot_every_steps == 0

    def begin(self, state: RunState, mesh: Mesh) -> None:
        """Go on from the state that a stage begins with or was restored to. Collective."""
        told.training = True
        self.numbers.begin(state)
        self.health.begin(mesh)

    def measured(self, state: RunState) -> AbstractContextManager:
        """Context around the work of the step that follows state, up to its gradients."""
        return self.health.measured(state.step + 1)

    def check(
        self, state: RunState, *, loss: float, grad_norm: float, origin: Callable[[], dict] | None = None
    ) -> None:
        """Judge the step that led to state, the same on all ranks; metrics says how. Collective.

        origin: where its batch came from, asked where the step was skipped. Raises ValueError when too many were.
        """
        numbers = self.numbers.check(state, loss=loss, grad_norm=grad_norm, origin=origin)
        self.metrics = {**numbers, **self.health.check()}

    def go_back(self, spiked: RunState, restored: RunState, about: dict) -> None:
        """Go on from an earlier state: see sbtrain.train.numbers. Collective."""
        self.spiked = False
        self.numbers.go_back(spiked, restored, about)

    def state_dict(self) -> dict:
        """What begin finds in a checkpoint's RunState."""
        return self.numbers.state_dict()
