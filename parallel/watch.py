"""RankWatch: ends this process, with one line that says who is missing, when other ranks were killed or hang.

Python cannot interrupt a collective that another rank never joins. So a thread looks where the main thread is
(parallel.place), tells the other ranks (parallel.post), and when it has not moved for the timeout asks who is missing
(parallel.verdict). The first rank that knows says so; all end with EXIT_CODE, or FAILED_CODE where a rank ended with an
error of its own, which another start would meet again. The store of the job is on rank 0, or in
torchrun: if it is gone or silent while this rank waits, that is the verdict.
"""

from __future__ import annotations

import contextlib
import dis
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from parallel.descendants import end_descendants
from parallel.lost import gave_up_waiting, lost_a_peer
from parallel.mesh import device
from parallel.pace import Pace
from parallel.place import Kind, Trail, here
from parallel.post import FAILED, VERDICT, Post
from parallel.stacks import write_stacks
from parallel.told import EXIT_CODE as STOPPED_CODE
from parallel.told import LIMIT_S, say_last, told, within
from parallel.verdict import AGAIN, Limits, Sight, decide

EXIT_CODE, FAILED_CODE = 76, 1
LONGEST_INTERVAL_S = 2.0
"""Between two signs of life; shorter where the timeout is."""
_MISSED, _SHORTEST_GRACE_S = 3, 2.0
"""Where something is known to be wrong, so many intervals without a sign are a death, but not less than so long."""
_SILENCE = 0.4
"""Where nothing is known, this part of the timeout is: half of it has passed before anybody listens."""
_REMEMBERED = 1024
"""Collectives that the GPU may lag behind the host and still be told apart."""
_CONTEXTS = "/contextlib.py"


class RankWatch:
    """Context around everything that ranks do together. Entering is collective; a world of one process has no threads.

    An error of torch.distributed that leaves the context, because a peer has gone, does not go further: the process
    ends with the line that names the peer.
    """

    def __init__(self, *, timeout_s: float, record: Callable[[int, str], None], stacks: str | Path | None = None):
        """timeout_s: the longest that ranks wait for one another. record(code, line): keeps how the job ended.

        stacks: folder below which every rank that a verdict ends writes what its threads are in; None: nowhere.
        """
        self._stacks = stacks
        self.timeout_s, self.interval_s = timeout_s, min(LONGEST_INTERVAL_S, timeout_s / 10)
        self._grace_s = max(_MISSED * self.interval_s, _SHORTEST_GRACE_S)
        self._record, self._post, self._stop = record, None, threading.Event()
        self._sight, self._seen = Sight(), None
        self._stayed_since = self._frozen_since = time.monotonic()
        self._broken_since: float | None = None
        self._error, self._gave_up, self._told = "", False, ""

    def __enter__(self) -> RankWatch:
        if not (dist.get_world_size() > 1 and "MASTER_PORT" in os.environ):
            return self
        self.rank, world_size = dist.get_rank(), dist.get_world_size()
        names = [uuid.uuid4().hex, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())]
        dist.broadcast_object_list(names, src=0)
        self._started = names[1]
        self._post = Post(
            names[0], rank=self.rank, world_size=world_size, interval_s=self.interval_s, timeout_s=self.timeout_s
        )
        self._post.sign = self._sign
        self._main, self._stays_on_rank_0 = threading.get_ident(), not _torchrun_has_the_store()
        self._post.start()
        here.on_patience_end = self._post.hasten
        if torch.cuda.is_available():
            here.trail = Trail([torch.cuda.Event() for _ in range(_REMEMBERED)])
        names = [("", 0)] * world_size
        dist.all_gather_object(names, (platform.node(), os.getpid()))
        self._hosts, self._who = [host for host, _ in names], [f"host {host}, process {pid}" for host, pid in names]
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._thread.start()
        told.spread(self._note)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._post is None:
            return
        told.spread(None)
        if error is not None and lost_a_peer(error):
            self._error, self._gave_up = str(error).splitlines()[0], gave_up_waiting(error)
            self._broken_since = time.monotonic()
            self._thread.join()  # which ends the process
        elif error is not None:
            text = (str(error).strip() or "no message").splitlines()[0]
            place = f" in '{here.broken.name}' (no. {here.broken.number})" if here.broken else ""
            self._post.say(FAILED, f"{kind.__name__}{place}: {text}", code=FAILED_CODE, wait_s=2 * self.interval_s)
        self._stop.set()
        self._thread.join()
        self._post.stop()
        if error is not None and self.rank == 0 and self._stays_on_rank_0:
            self._post.wait_until_left(limit_s=2 * self._grace_s)
        self._post = here.trail = here.on_patience_end = None
        if self._told and error is None:  # too late to tell the others, who are leaving too
            told.end(self._told)

    def _note(self, reason: str) -> None:
        """This rank was told to stop where nothing is to be saved: the thread ends all."""
        self._told = reason

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self.interval_s):
            missed_s = time.monotonic() - looked - self.interval_s
            looked += missed_s + self.interval_s
            if missed_s > self._grace_s:  # the whole process stood still, as in a suspended job: nobody is late
                self._stayed_since, self._frozen_since = self._stayed_since + missed_s, self._frozen_since + missed_s
                self._post.answered_s += missed_s
                continue
            self._look()
            verdict = self._post.verdict
            if verdict:
                line = verdict["text"]
                self._end(verdict["code"], line if verdict["rank"] == self.rank else None, why=line)
            if self._told:
                self._decide(STOPPED_CODE, self._told)
            failure, lost = self._failure(), self._lost_store() or self._missing()
            if failure or lost:
                self._decide(FAILED_CODE if failure else EXIT_CODE, failure or lost)

    def _decide(self, code: int, line: str) -> None:
        """End this process; tell the others why, unless the store is gone or another rank was first."""
        if self._store_is_mute():
            self._end(code, line if self._speaks_for_its_host() else None, why=line)
        self._post.say(VERDICT, line, code=code, wait_s=4 * self.interval_s)
        verdict = self._post.verdict
        other = bool(verdict) and verdict["rank"] != self.rank
        self._end(code, None if other else line, why=verdict["text"] if other else line)

    def _look(self) -> None:
        """Where the main thread is, and for how long."""
        now, broken = time.monotonic(), self._broken_since is not None
        at = here.broken if broken and here.broken else here.at
        frame = None if broken else _innermost(sys._current_frames().get(self._main))
        if (at, _stack(frame)) != self._seen:
            if self._seen is None or at != self._seen[0]:
                self._stayed_since = now
            self._seen, self._frozen_since = (at, _stack(frame)), now
        stayed_s = now - self._stayed_since
        called = "" if at.kind is Kind.wait else _awaited(frame)
        waiting = bool(at.kind is Kind.wait or called or broken)
        device = ""
        if here.trail is not None and stayed_s > self.timeout_s / 4:
            busy, unfinished = _device_is_busy(), here.trail.unfinished()
            waiting = waiting or busy
            device = f"'{unfinished.name}' (no. {unfinished.number})" if unfinished and unfinished != at else ""
        self._sight = Sight(
            name=f"{at.name}: {called}" if called else at.name,
            number=at.number,
            waiting=waiting,
            patient=at.kind is Kind.patient,
            at=_line(frame),
            device=device,
            stayed_s=stayed_s,
            frozen_s=now - self._frozen_since,
        )
        self._post.suspects, self._post.hurry = broken or stayed_s >= self.timeout_s / 2, broken

    def _sign(self) -> dict:
        sight, at = self._sight, here.at
        moved_on = self._broken_since is None and self._seen is not None and at != self._seen[0]
        if moved_on:  # since the last look
            waiting, patient = at.kind is Kind.wait, at.kind is Kind.patient
            sight = Sight(name=at.name, number=at.number, waiting=waiting, patient=patient)
        return {key: getattr(sight, key) for key in Sight.__dataclass_fields__ if key not in ("silent_s", "left")}

    def _missing(self) -> str | None:
        now, post = time.monotonic(), self._post
        if not (post.suspects and post.listens):
            return None
        sights = []
        for rank, sign in enumerate(post.signs):
            known = {key: value for key, value in sign.items() if key != "count"}
            sights.append(Sight(**known, silent_s=post.silent_s(rank)))
        sights[self.rank] = self._sight
        broken_s = None if self._broken_since is None else now - self._broken_since
        silent_s = _SILENCE * self.timeout_s if broken_s is None else self._grace_s
        limits = Limits(timeout_s=self.timeout_s, silent_s=silent_s, broken_s=broken_s, gave_up=self._gave_up)
        line = decide(sights, self._who, rank=self.rank, limits=limits)
        return f"{line} ({self._error})" if line and self._error and broken_s >= self.timeout_s else line

    def _num_dead(self) -> int:
        """Ranks that give no sign of life, of those that this rank listens to."""
        post = self._post
        limit_s = _SILENCE * self.timeout_s if self._broken_since is None else self._grace_s
        others = (rank for rank in range(post.world_size) if rank != self.rank)
        here_still = [rank for rank in others if not post.signs[rank].get("left")]
        return sum(post.silent_s(rank) >= limit_s for rank in here_still) if post.listens else 0

    def _hangs_for(self, limit_s: float) -> bool:
        return self._broken_since is not None or (self._sight.waiting and self._sight.frozen_s >= limit_s)

    def _failure(self) -> str | None:
        """A rank that ended with an error of its own says so itself."""
        failed = self._post.failed
        if not failed or failed["rank"] == self.rank or not self._hangs_for(self._grace_s):
            return None
        rank = failed["rank"]
        return f"rank {rank} ({self._who[rank]}): ended with {failed['text']}; {self._waits()}"

    def _lost_store(self) -> str | None:
        """The store does not answer any more while this rank hangs."""
        post = self._post
        limit_s = self._grace_s if post.lost and self._stays_on_rank_0 else self.timeout_s
        if not (self._store_is_mute() and self._hangs_for(limit_s)):
            return None
        how = "is gone" if post.lost else f"has not answered for {time.monotonic() - post.answered_s:.0f} s"
        if not self._stays_on_rank_0:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return f"the job's store, torchrun's at {where}, {how}; {self._waits()}; {AGAIN}"
        sign = post.signs[0]
        last = f", last seen in {Sight(sign['name'], sign['number'], at=sign['at']).place}" if sign else ""
        return f"rank 0 ({self._who[0]}): {how}{last}; {self._waits()}; {AGAIN}"

    def _store_is_mute(self) -> bool:
        return bool(self._post.lost) or time.monotonic() - self._post.answered_s >= _SILENCE * self.timeout_s

    def _waits(self) -> str:
        broken = "gave up waiting" if self._gave_up else "lost a connection"
        verb = "waits" if self._broken_since is None else broken
        return f"rank {self.rank} {verb} in {self._sight.place}"

    def _speaks_for_its_host(self) -> bool:
        """Without the store nobody knows who speaks: the first rank of every host does, rank 0 never."""
        first = 1 if self._stays_on_rank_0 else 0
        return self.rank >= first and self.rank == self._hosts.index(self._hosts[self.rank], first)

    def _end(self, code: int, line: str | None, *, why: str) -> None:
        """End the process with the code, saying line first; None: another rank says it. why: that rank's line."""
        if line:
            kind = "stopped" if code == STOPPED_CODE else "error"
            say_last(f"{kind}: {line}")
        within(LIMIT_S, lambda: self._keep(code, line, why))
        self._post.stop()
        if self.rank == 0 and self._stays_on_rank_0:
            self._post.wait_until_left(limit_s=self._grace_s, num_dead=self._num_dead())  # they must have read it
        try:
            end_descendants()
        finally:
            os._exit(code)

    def _keep(self, code: int, line: str | None, why: str) -> None:
        """Write what outlives the process, which a file system may never finish."""
        if line:
            self._record(code, line)
        if self._stacks is not None and code != STOPPED_CODE and Path(self._stacks).parent.is_dir():
            with contextlib.suppress(OSError):
                write_stacks(Path(self._stacks) / self._started / f"rank_{self.rank}.txt", why)


def _torchrun_has_the_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _stack(frame: FrameType | None) -> tuple:
    """Changes whenever the thread does anything in Python."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def _innermost(frame: FrameType | None) -> FrameType | None:
    """The innermost call that is not a Pace's, which stands between a collective and whoever called it."""
    while frame is not None and frame.f_globals.get("__name__") == Pace.__module__:
        frame = frame.f_back
    return frame


def _awaited(frame: FrameType | None) -> str:
    """The collective of torch.distributed that the thread is in, also one that nobody marked; empty if in none."""
    if frame is None:
        return ""
    code = frame.f_code
    if code.co_filename.endswith("torch/distributed/distributed_c10d.py"):
        return code.co_name
    called = ""
    for step in dis.get_instructions(code):
        if step.offset > frame.f_lasti:
            break
        if step.opname in ("LOAD_METHOD", "LOAD_ATTR"):
            called = step.argval
    return f"wait in {code.co_name}" if called == "wait" else ""


def _line(frame: FrameType | None) -> str:
    """file.py:line of the innermost call outside of torch."""
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename.endswith(_CONTEXTS)):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""


def _device_is_busy() -> bool:
    """Whether the GPU still has work of this process: then it, and not the main thread, is what hangs or waits."""
    try:
        return not torch.cuda.default_stream(device()).query()
    except RuntimeError:  # the main thread gets that error too
        return False
