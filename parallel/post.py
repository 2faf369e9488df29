"""Post: how the ranks of a job leave word for one another while their main threads hang in collectives.

Over a connection of its own to the job's store, because torch's waits hold theirs. Every few seconds a rank leaves a
sign of life with its place, and reads whether anything was decided: two small messages. Only a rank that suspects
something reads the others' signs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

VERDICT, FAILED, LEFT = "verdict", "failed", "left"
_RARELY = 16
"""A rank that suspects something reads all signs this many times a timeout, not more: n ranks read n signs each."""


class Post:
    """Word from and for all ranks. Its thread alone talks to the store, which may never answer."""

    def __init__(self, prefix: str, *, rank: int, world_size: int, interval_s: float, timeout_s: float):
        self.rank, self.world_size, self.interval_s = rank, world_size, interval_s
        self.sign: Callable[[], dict] = dict
        """What this rank says of itself; called by the thread."""
        self.suspects, self.hurry, self.listens = False, False, False
        """Whether to read all signs, whether in every round, and whether that has begun."""
        self.verdict, self.failed, self.lost = None, None, None
        """{rank, text, code} decided for all, and of the first rank that failed; why the store is lost."""
        self.signs: list[dict] = [{} for _ in range(world_size)]
        self._changed_s = [0.0] * world_size
        self.answered_s = time.monotonic()
        self._rarely_s, self._read_s = max(interval_s, timeout_s / _RARELY), 0.0
        self._count, self._say, self._leaving = 0, {}, False
        self._wake, self._told = threading.Event(), threading.Event()
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(timeout_s, 10.0)),
        )
        self._store = dist.PrefixStore(prefix, store)
        if rank == 0:
            self._store.set(VERDICT, "")
            self._store.set(FAILED, "")
        self._thread = threading.Thread(target=self._run, name="post", daemon=True)

    def start(self) -> None:
        """Leave the first sign, and begin."""
        self._leave_sign()
        self._thread.start()

    def say(self, key: str, text: str, *, code: int, wait_s: float) -> None:
        """Put text under VERDICT or FAILED unless somebody was first, and wait until that is done, but not longer.

        code: the exit code that goes with it.
        """
        self._told.clear()
        self._say = {**self._say, key: json.dumps({"rank": self.rank, "text": text, "code": code})}
        self._wake.set()
        self._told.wait(wait_s)

    def hasten(self) -> None:
        """Leave the next sign now."""
        self._wake.set()

    def wait_until_left(self, *, limit_s: float, num_dead: int = 0) -> None:
        """After stop: wait until the other living ranks have left too, since the store ends with this process."""
        deadline = time.monotonic() + limit_s
        while not (self._thread.is_alive() or self.lost or time.monotonic() >= deadline):
            if self._store.add(LEFT, 0) >= self.world_size - num_dead:
                return
            time.sleep(self.interval_s / 10)

    def silent_s(self, rank: int) -> float:
        """Between the last time that all signs were read and the last time that this one was new, while `listens`.

        All are new when this rank begins to suspect something.
        """
        return max(0.0, self._read_s - self._changed_s[rank])

    def stop(self) -> None:
        """Leave: end the thread, unless the store never answers it."""
        self._leaving = True
        self._wake.set()
        self._thread.join(max(1.0, 2 * self.interval_s))

    def _run(self) -> None:
        try:
            while not self._leaving:
                self._round()
                self._wake.wait(self.interval_s)
                self._wake.clear()
            self._leave_sign()
            self._store.add(LEFT, 1)
        except (RuntimeError, ValueError) as error:  # torch's store errors are of the first kind
            self.lost = str(error).splitlines()[0]
            self._told.set()

    def _round(self) -> None:
        self._leave_sign()
        said = self._say
        for key, text in said.items():
            self._store.compare_set(key, "", text)
        keys = [VERDICT, FAILED]
        if not self.suspects:
            self.listens = False
        everyone = self.suspects and (
            self.hurry or not self.listens or time.monotonic() - self._read_s >= self._rarely_s
        )
        if everyone:
            keys += [str(rank) for rank in range(self.world_size)]
        elif self.rank:
            keys.append("0")
        self.verdict, self.failed, *signs = (json.loads(text or "null") for text in self._store.multi_get(keys))
        self.answered_s = time.monotonic()
        for rank, sign in enumerate(signs):
            if sign != self.signs[rank] or (everyone and not self.listens):
                self.signs[rank], self._changed_s[rank] = sign, self.answered_s
        if everyone:
            self._read_s, self.listens = self.answered_s, True
        if said and said == self._say:
            self._say = {}
            self._told.set()

    def _leave_sign(self) -> None:
        self._count += 1
        self._store.set(str(self.rank), json.dumps({"count": self._count, **self.sign(), "left": self._leaving}))
