"""RunLock: one job at a time in a run directory.

lock.json says which host, process and job holds the directory; its holder touches it every few seconds. Who finds it
looks whether that process lives, if it is on this machine, or else waits for the next touch. No clocks of two machines
are compared: the file system's own time counts.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from parallel.place import primitive, section

LOCK = "lock.json"
BEAT_S = 10.0
"""Between two touches."""
STALE_S = 120.0
"""A lock of another machine that nobody touched for so long is stale: longer than file systems usually stand still."""
_LOOK_S = 0.5


class RunInUse(ValueError):
    """Another job holds the run directory; nothing in it may be touched."""


class EarlierStart(RunInUse):
    """An earlier start of this very job does: Slurm gave its node up, but it has not ended yet."""


_REFUSALS = {"in use": RunInUse, "earlier start": EarlierStart, "unwritable": ValueError}


@contextmanager
def held(lock: RunLock) -> Iterator[RunLock]:
    """Context in which this job holds the run directory. Collective; rank 0 holds it for all.

    Raises RunInUse, in one line, where another job does, EarlierStart where this one does itself, and ValueError where
    the directory cannot be written.
    """
    answer = [None, None]
    with section("lock of the run directory", patient=True):
        if dist.get_rank() == 0:
            answer = [lock.take(), lock.token]
        with primitive("lock of the run directory"):
            dist.broadcast_object_list(answer, src=0)
    refusal, token = answer
    if refusal:
        kind, line = refusal
        raise _REFUSALS[kind](line)
    lock.follow(token)
    try:
        yield lock
    finally:
        lock.release()


class RunLock:
    """lock.json of a run directory, held or wanted by this process."""

    def __init__(self, run_dir: Path, *, job: str = "", beat_s: float = BEAT_S, stale_s: float = STALE_S):
        """job: what the cluster calls this job; beat_s, stale_s: see BEAT_S and STALE_S."""
        self.run_dir, self.path, self.beat_s, self.stale_s = run_dir, run_dir / LOCK, beat_s, stale_s
        pid = os.getpid()
        self._mine = {"token": uuid.uuid4().hex, "host": platform.node(), "pid": pid, "started": _started(pid)}
        self._mine |= {"machine": _machine(), "job": job}
        self._made: list[Path] = []
        self._stop, self._thread = threading.Event(), None
        self.token, self._held = self._mine["token"], False
        """What lock.json says while this job holds it; it is rank 0's on all ranks."""

    def take(self) -> tuple[str, str] | None:
        """Take the lock, waiting until a holder on another machine has shown whether it lives.

        Returns None, or why not: "in use", "earlier start" or "unwritable", and a line for the user.
        """
        try:
            self._make_folder()
            while not self._create():
                holder = self._read()
                if holder is not None and self._lives(holder):
                    same = bool(self._mine["job"]) and holder.get("job") == self._mine["job"]
                    return "earlier start" if same else "in use", self._refusal(holder)
                if holder is not None:
                    self._put_aside(holder)
        except OSError as error:
            self._remove_folder()
            reason = error.strerror or error
            return "unwritable", f"run_dir={self.run_dir}: {reason}; free some space there or choose a writable folder"
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        self._held = True
        return None

    def follow(self, token: str) -> None:
        """Rank 0 of this job holds the directory, by that token."""
        self.token, self._held = token, True

    def release(self) -> None:
        """Give the lock back, if this process has it, and folders that it made and nobody used."""
        self._held = False
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with suppress(OSError):  # a lock that stays is stale by itself, and how the run ended stands
            if self.is_ours():
                self.path.unlink(missing_ok=True)
            self._remove_folder()

    def is_ours(self) -> bool:
        """Whether the file is still this job's."""
        holder = self._read()
        return bool(holder) and holder.get("token") == self.token

    def is_anothers(self) -> bool:
        """Whether another job holds the directory, or has held it since this one did; also where that cannot be told.

        Then how the run ended is not this job's to say. Any rank may ask, at any time; raises nothing.
        """
        try:
            return not self.is_ours() if self._held else in_use(self.run_dir)
        except (OSError, ValueError, RecursionError):
            return True

    def check(self) -> None:
        """Raise RunInUse if another job took the directory over, which then must not be written to any more."""
        if self._thread is not None and not self.is_ours():
            holder = self._read() or {}
            raise RunInUse(
                f"run_dir={self.run_dir} was taken over by {_who(holder)} while this job stood still; "
                "this job saves nothing more"
            )

    def _create(self) -> bool:
        try:
            _write_new(self.path, json.dumps(self._mine))
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict | None:
        """Who holds the lock; None where nobody does; an empty holder where the file says nothing."""
        return _holder(self.path)

    def _lives(self, holder: dict) -> bool:
        here = _lives_here(holder)
        if here is not None:
            return here
        touched, wait_s = _touched(self.path), self.stale_s - _age_s(self.path)
        if wait_s > 0:
            line = f"run_dir={self.run_dir}: waiting for a sign of life from {_who(holder)}, {wait_s:.0f} s at most"
            print(line, flush=True)
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            time.sleep(min(_LOOK_S, self.beat_s))
            if self._read() != holder:
                return False  # it is another's by now, or free: look again
            if _touched(self.path) != touched:
                return True
        return False

    def _put_aside(self, holder: dict) -> None:
        """Remove a stale lock, unless it has become another job's meanwhile."""
        if self._read() != holder:
            return
        aside = self.path.with_name(f"lock.{self._mine['token']}.partial")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        try:
            if _holder(aside) != holder:
                self._put_back(aside)  # another job was faster by a moment
        finally:
            aside.unlink(missing_ok=True)

    def _put_back(self, aside: Path) -> None:
        """Give another job's lock its name again, unless a third one has taken the directory by now.

        Renaming would replace that one's. Where the file system has no hard links, the lock is written again under the
        same condition: until its content is there it says nothing, and nobody takes such a one before it is stale.
        """
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return
        except OSError:
            content = aside.read_text(encoding="utf-8")
            try:
                _write_new(self.path, content)
            except FileExistsError:
                return

    def _beat(self) -> None:
        while not self._stop.wait(self.beat_s):
            try:
                if self.is_ours():
                    os.utime(self.path)
            except OSError:
                continue  # a file system that stands still

    def _refusal(self, holder: dict) -> str:
        return (
            f"run_dir={self.run_dir} is in use by {_who(holder)}; wait for its end or choose another run_dir "
            f"({self.path.name} says so)"
        )

    def _make_folder(self) -> None:
        folder = self.run_dir
        while not folder.exists():
            self._made.append(folder)
            folder = folder.parent
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def _remove_folder(self) -> None:
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return


def _write_new(path: Path, content: str) -> None:
    """Raises FileExistsError where there is a file of that name, and OSError, leaving none, where the disk is full."""
    with open(path, "x", encoding="utf-8") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def in_use(run_dir: Path) -> bool:
    """Whether another job seems to hold the run directory, without waiting for its next sign of life."""
    path = run_dir / LOCK
    try:
        holder = _holder(path)
        if holder is None:
            return False
        here = _lives_here(holder)
        return _age_s(path) < STALE_S if here is None else here
    except OSError:
        return False


def _lives_here(holder: dict) -> bool | None:
    """Whether the process that holds a lock lives; None if it is not among those that this one can see."""
    if not (_machine() and holder.get("machine") == _machine() and type(holder.get("pid")) is int):
        return None
    started = _started(holder["pid"])
    if started is None and _is_another_users(holder["pid"]):
        return None
    return started is not None and started == holder.get("started")


def _touched(path: Path) -> float | None:
    """When the lock was touched last, by the file system's time; None where it is gone."""
    try:
        with open(path, "rb") as file:  # opening asks a network's server, where a stat may be remembered
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _age_s(path: Path) -> float:
    """Seconds since the lock was touched, both times told by the file system; 0 where it is gone."""
    probe = path.with_name(f"clock.{uuid.uuid4().hex}.partial")
    try:
        touched = _touched(path)
        with open(probe, "xb") as file:
            now = os.fstat(file.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)
    return 0.0 if touched is None else max(0.0, now - touched)


def _holder(path: Path) -> dict | None:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _who(holder: dict) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"host {holder.get('host', 'unknown')}, process {holder.get('pid', 'unknown')}{job}"


def _machine() -> str:
    """The same for all processes that see one another's process numbers; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_another_users(pid: int) -> bool:
    """Whether a process of this number lives that /proc may hide from this user."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _started(pid: int) -> int | None:
    """When a process of this machine started, in ticks since the machine did; None where it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
