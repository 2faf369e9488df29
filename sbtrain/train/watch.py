"""Watch: decides between steps whether to save and whether to stop: signals, intervals, broken losses."""

from __future__ import annotations

import math
import signal

import torch
import torch.distributed as dist

from parallel.place import primitive
from sbtrain.checkpoint.state import RunState

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Watch:
    """Catches SIGTERM, SIGINT and SIGUSR1 while it is open; a signal stops the run after the step it arrives in."""

    def __init__(self, *, save_every_steps: int, device: torch.device):
        self.save_every_steps, self._device = save_every_steps, device
        self._signal: int | None = None
        self._previous: dict = {}

    def __enter__(self) -> Watch:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self._signal = number

    @property
    def reason(self) -> str:
        """What stopped the run, for exit.json."""
        return "stopped by another rank" if self._signal is None else signal.Signals(self._signal).name

    def must_stop(self) -> bool:
        """Whether any rank was told to stop. Collective: all ranks get the same answer."""
        return self._any(self._signal is not None)

    def _any(self, here: bool) -> bool:
        flag = torch.tensor(int(here), device=self._device)
        with primitive("signals"):
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            return bool(flag)

    def save_due(self, state: RunState) -> bool:
        """Whether the interval asks for a checkpoint after this step."""
        return self.save_every_steps > 0 and state.step % self.save_every_steps == 0

    def check(self, state: RunState, *, loss: float, grad_norm: float) -> None:
        """Raise ArithmeticError before a loss or gradient that is not finite spoils the run any further."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise ArithmeticError(
                f"step {state.step} of stage {state.stage}: loss {loss}, gradient norm {grad_norm}; the newest "
                "checkpoint is intact; lower the stage's schedule.lr and start again, or look at the data"
            )
