"""Told: what a signal that asks for the end does while no step is trained. Training asks for signals by itself.

Python calls handlers in its main thread, which may wait in a collective for ever, or import a library. So a thread is
woken beside it. Nothing is to be saved then, so the process ends at once, as if killed, but says how it ended.

Needs no torch: it listens before that is imported. What this process was told is a fact of the process, so it is kept
here once (as in parallel.place).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75
"""Of a process that asks for another start: sysexits.h, EX_TEMPFAIL."""
LIMIT_S = 5.0
"""How long a file system that may hang is waited for."""


class Told:
    """Of one process."""

    def __init__(self):
        self.training = False
        """Whether somebody else asks for signals: see sbtrain.train.watch."""
        self.record: Callable[[int, str], None] | None = None
        """Keeps code and reason of the end, once there is a place for them. Called by the thread."""
        self._spread: Callable[[str], None] | None = None
        self._guard, self._over = threading.Lock(), False

    def listen(self) -> None:
        """From now on signals count. Called once, in the main thread."""
        ours, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _wake)
        os.register_at_fork(after_in_child=_be_deaf)  # a child's signals are not its parent's
        threading.Thread(target=self._run, args=(ours,), name="told", daemon=True).start()

    def spread(self, call: Callable[[str], None] | None) -> None:
        """call(reason) ends all ranks of the job from now on; None: this process can end by itself alone again."""
        with self._guard:
            self._spread = call

    def over(self) -> None:
        """How this process ends is decided: signals change nothing any more."""
        with self._guard:
            self._over = True

    def end(self, reason: str) -> None:
        """End this process, saying so where there is a place for it."""
        try:
            if int(os.environ.get("RANK", 0)) == 0:
                say_last(f"stopped: {reason}")
            within(LIMIT_S, _end_descendants)
            if self.record is not None:  # last: until then the main thread goes on, and may begin the run
                within(LIMIT_S, lambda: self.record(EXIT_CODE, reason))
        finally:
            os._exit(EXIT_CODE)

    def _run(self, pipe: int) -> None:
        while heard := os.read(pipe, 1):
            if heard[0] in SIGNALS:
                self._hear(f"{signal.Signals(heard[0]).name}, while no step was trained")

    def _hear(self, reason: str) -> None:
        with self._guard:
            if self._over or self.training:
                return
            if self._spread is None:
                self.end(reason)
            self._spread(reason)


def within(limit_s: float, call: Callable[[], None]) -> None:
    """call() in a thread; returns when it does, or after limit_s seconds without it. What it raises is the thread's."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(limit_s)


def say_last(line: str) -> None:
    """A line on stderr, past the lock of sys.stderr, which a thread that hangs may hold; nothing where nobody reads."""

    def write() -> None:
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())

    within(LIMIT_S, write)


def _end_descendants() -> None:
    from parallel.descendants import end_descendants  # its package need not be there before a signal comes

    end_descendants()


def _wake(number, frame) -> None:
    """Python writes to the pipe before it calls this."""


def _be_deaf() -> None:
    with suppress(ValueError):  # not the main thread
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _wake:
                signal.signal(number, signal.SIG_DFL)


told = Told()
