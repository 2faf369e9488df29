"""Points of a rank at which a fault can happen: every place that it enters (parallel.place) and every file that it
flushes or renames. What happens at one of them is seeded, so it can be repeated.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

from parallel.place import _Mark
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.recover import step_folders
from sbtrain.train.watch import Watch

FLIPPED = 0x01
"""Ids of tokens with this bit flipped are ids of the vocabulary."""


@dataclass(frozen=True)
class Fault:
    """One fault, and when: at the points-th point behind a step, as soon as the run has so many checkpoints.

    kind: see HAPPENS. rank: whose points are counted. in_writer: those of its writer process instead. amount: what the
    kind makes of it; for sigterm, the points up to the second signal.
    """

    kind: str
    rank: int
    step: int
    points: int
    num_checkpoints: int = 0
    in_writer: bool = False
    amount: int = 0


class Points:
    """Counts the points of this process, and has the fault happen."""

    def __init__(self, fault: Fault, rank: int, case: dict):
        """case: of drills.template; its folder is where ranks leave their process ids and this the word that it was."""
        self._fault, self._rank, self._case = fault, rank, case
        self._process = None if fault.in_writer else os.getpid()
        self._step, self._num_points, self._left = 0, 0, 2 if fault.kind == "sigterm" else 1
        self._one_at_a_time = threading.RLock()

    def install(self) -> None:
        """From now on in this process, and its writer."""
        enter, check = _Mark.__enter__, Watch.check

        def enter_and_count(mark):
            enter(mark)
            self.reach(mark._name)

        def check_and_count(watch, state, **figures):
            check(watch, state, **figures)
            self._step = state.step

        _Mark.__enter__, Watch.check = enter_and_count, check_and_count
        for name in ("fsync", "replace", "rename"):
            setattr(os, name, self._counting(name, getattr(os, name)))

    def enter_writer(self) -> None:
        """This process is the writer of the rank."""
        if self._fault.in_writer:
            self._process, self._step = os.getpid(), self._fault.step

    def reach(self, name: str) -> None:
        """This process is at a point. Other threads of a rank do not count, nor processes that help it to save."""
        in_thread = threading.current_thread() is not threading.main_thread() and not self._fault.in_writer
        if self._fault.rank == self._rank and self._process == os.getpid() and not in_thread:
            with self._one_at_a_time:
                self._count(name)

    def _count(self, name: str) -> None:
        if self._left == 0 or self._step < self._fault.step:
            return
        self._num_points += 1
        if self._num_points > self._fault.points and self._has_checkpoints():
            self._left -= 1
            self._num_points = self._fault.points - self._fault.amount  # until a second signal
            where = f"'{name}' of {'the writer of ' if self._fault.in_writer else ''}rank {self._rank}"
            with open(Path(self._case["folder"], "fault"), "a", encoding="utf-8") as file:
                file.write(f"{self._fault.kind} behind step {self._step} in {where}\n")
            HAPPENS[self._fault.kind](self._fault, self._case)

    def _has_checkpoints(self) -> bool:
        """Up to the one that the ledger calls the newest."""
        if not self._fault.num_checkpoints:
            return True
        run_dir = Path(self._case["run_dir"])
        newest = Ledger(run_dir).step
        return sum(0 < step <= newest for step in step_folders(run_dir)) >= self._fault.num_checkpoints

    def _counting(self, name: str, call):
        def count_and_call(*args, **kwargs):
            self.reach(f"os.{name}")
            return call(*args, **kwargs)

        return count_and_call


def pids(case: dict) -> list[int]:
    """Of all ranks."""
    return [int(Path(case["folder"], f"pid_{rank}").read_text()) for rank in range(case["num_ranks"])]


def kill_one(fault: Fault, case: dict) -> None:
    os.kill(pids(case)[fault.rank], signal.SIGKILL)


def kill_all(fault: Fault, case: dict) -> None:
    """This rank last."""
    order = pids(case)
    for pid in [*order[: fault.rank], *order[fault.rank + 1 :], order[fault.rank]]:
        os.kill(pid, signal.SIGKILL)


def lose_ledger(fault: Fault, case: dict) -> None:
    Path(case["run_dir"], "ledger.json").unlink(missing_ok=True)
    kill_all(fault, case)


def fill(fault: Fault, case: dict) -> None:
    """amount: bytes that stay free."""
    room = os.statvfs(case["run_dir"])
    wanted = room.f_bavail * room.f_frsize - fault.amount
    with open(Path(case["ballast"]), "wb", buffering=0) as file:
        while wanted > 0:
            wanted -= file.write(bytes(min(wanted, 1 << 20)))


def corrupt(fault: Fault, case: dict) -> None:
    """In place, as a bad disk does; amount: 0 cuts the file instead."""
    path = Path(case["shard"])
    if not fault.amount:
        os.truncate(path, path.stat().st_size // 2)
        return
    with open(path, "r+b") as file:
        file.write(bytes(byte ^ FLIPPED if index % 2 == 0 else byte for index, byte in enumerate(path.read_bytes())))


def sigterm(fault: Fault, case: dict) -> None:
    """To every process of every rank, as a batch system does."""
    for pid in pids(case):
        os.killpg(pid, signal.SIGTERM)


HAPPENS = {
    "kill_one": kill_one, "kill_all": kill_all, "truncate": kill_all, "lose_ledger": lose_ledger, "fill": fill,
    "corrupt": corrupt, "sigterm": sigterm,
}  # fmt: skip
"""By kind. A truncated checkpoint is cut when all ranks are dead."""
