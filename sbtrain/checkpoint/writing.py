"""WriterProcess: the training process's end of its writer (sbtrain.checkpoint.writer)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Pipe
from pathlib import Path

from sbtrain.checkpoint.writer import Done

_ROOT = Path(__file__).resolve().parents[2]
_CODE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sbtrain.checkpoint import writer; "
_CODE += "writer.main(*map(int, sys.argv[1:]))"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_END_S = 30.0
"""What it gets at the end of a run to delete old checkpoints; the next start deletes the rest."""


class WriterProcess:
    """One process, started here and now; importing torch takes it seconds, which nobody waits for."""

    def __init__(self, memory: int):
        """memory: descriptor of the shared memory. Called by the main thread, whose end the process notices."""
        self._told = False
        self._pipe, theirs = Pipe()
        descriptors = (theirs.fileno(), memory)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # inherited: it ignores them before any arrives
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(_ROOT), *map(str, descriptors), str(os.getpid())],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message) -> None:
        """Have it carry out a message, after those before. A process that has ended is noticed by answers()."""
        self._told = True
        with contextlib.suppress(OSError):
            self._pipe.send(message)

    def answers(self) -> tuple[list[Done], bool]:
        """What has come back since the last call, and whether the process still lives. Does not wait."""
        alive, found = self._process.poll() is None, []
        try:
            while self._pipe.poll():
                found.append(self._pipe.recv())
        except (EOFError, OSError):
            alive = False
        return found, alive

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def close(self) -> None:
        """End it when it has carried out what it was told; at once where that was nothing."""
        if self._told:
            self.send(None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        self.kill()
