"""The lock: one job at a time in a run directory, and what a dead job leaves is in nobody's way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from parallel.job import job_id
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.checkpoint import lock as lock_module
from sbtrain.checkpoint.lock import LOCK, RunInUse, RunLock, held, in_use
from sbtrain.checkpoint.run_dir import record_end
from sealed import edit

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from sbtrain.checkpoint.lock import RunLock
print(RunLock(Path({run_dir!r}), job="41").take(), flush=True)
time.sleep(60)
"""


def lock(run_dir: Path) -> RunLock:
    return RunLock(run_dir, job="42", beat_s=0.05, stale_s=0.6)


@contextmanager
def other_process(run_dir: Path):
    """Another process that holds the lock."""
    program = HOLDER.format(root=str(ROOT), run_dir=str(run_dir))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "None\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def elsewhere(run_dir: Path) -> None:
    """Make the lock one of a process on another machine."""
    touched = (run_dir / LOCK).stat().st_mtime
    edit(run_dir / LOCK, machine="another", host="node7")
    os.utime(run_dir / LOCK, (touched, touched))


def test_it_comes_and_goes(tmp_path):
    first = lock(tmp_path)
    assert first.take() is None and first.is_ours()
    holder = json.loads((tmp_path / LOCK).read_text())
    assert holder["pid"] == os.getpid() and holder["host"] and holder["job"] == "42"
    kind, line = RunLock(tmp_path, job="43").take()
    assert kind == "in use" and "\n" not in line
    assert lock(tmp_path).take() == ("earlier start", line), "the same job, which Slurm has started again"
    assert line.startswith(
        f"run_dir={tmp_path} is in use by host {holder['host']}, process {os.getpid()}, job 42; wait"
    )
    first.release()
    assert list(tmp_path.iterdir()) == []
    second = lock(tmp_path)
    assert second.take() is None
    first.release()  # twice is once
    assert second.is_ours()
    second.release()


def test_a_process_that_was_killed_holds_nothing(tmp_path):
    with other_process(tmp_path) as process:
        assert in_use(tmp_path) and lock(tmp_path).take()[0] == "in use"
        process.send_signal(signal.SIGSTOP)
        assert lock(tmp_path).take()[0] == "in use", "suspended is not dead"
        process.kill()
        while in_use(tmp_path):
            time.sleep(0.01)  # a zombie, which nobody has waited for, is dead
        ours = lock(tmp_path)
        assert ours.take() is None
        ours.release()


def test_a_process_number_that_is_another_process_by_now_is_dead(tmp_path):
    first = lock(tmp_path)
    assert first.take() is None
    edit(tmp_path / LOCK, started=1)
    second = lock(tmp_path)
    assert not in_use(tmp_path) and second.take() is None
    first.release()
    assert second.is_ours()
    second.release()


def test_a_process_of_another_user_that_is_hidden_is_judged_by_its_touches(tmp_path, monkeypatch):
    """A machine may hide other users' processes from /proc (hidepid)."""

    def refused(pid, number):
        raise PermissionError

    first = lock(tmp_path)
    assert first.take() is None
    monkeypatch.setattr(lock_module, "_started", lambda pid: None)
    assert not in_use(tmp_path)
    monkeypatch.setattr(os, "kill", refused)
    assert in_use(tmp_path) and lock(tmp_path).take()[0] == "earlier start"
    monkeypatch.undo()
    first.release()


def test_another_machine_that_gives_signs_of_life_is_waited_for_only_briefly(tmp_path, capsys):
    first = lock(tmp_path)
    assert first.take() is None
    stop = threading.Event()
    elsewhere(tmp_path)

    def beat():
        while not stop.wait(0.05):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert in_use(tmp_path)
        kind, line = RunLock(tmp_path, job="43").take()
    finally:
        stop.set()
        thread.join()
    assert kind == "in use" and "host node7" in line
    first._stop.set()
    assert "waiting for a sign of life from host node7" in capsys.readouterr().out


def test_another_machine_without_signs_of_life_is_dead_after_a_while(tmp_path):
    first = lock(tmp_path)
    assert first.take() is None
    first._stop.set(), first._thread.join()
    elsewhere(tmp_path)
    start, second = time.monotonic(), lock(tmp_path)
    assert second.take() is None and 0.2 < time.monotonic() - start < 20
    assert second.is_ours() and sorted(path.name for path in tmp_path.iterdir()) == [LOCK]
    with pytest.raises(RunInUse, match="was taken over by .* while this job stood still; this job saves nothing more"):
        first.check()
    second.check()
    first.release()
    assert second.is_ours(), "the old one does not take it away"
    second.release()


def test_an_old_lock_of_another_machine_costs_no_waiting(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"machine": "another", "host": "node7", "pid": 3, "token": "x"}))
    os.utime(tmp_path / LOCK, (1, 1))
    ours, start = RunLock(tmp_path), time.monotonic()
    assert not in_use(tmp_path) and ours.take() is None and time.monotonic() - start < 5
    ours.release()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"pid": "x"}'])
def test_a_lock_that_says_nothing_becomes_stale_too(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    ours = lock(tmp_path)
    assert ours.take() is None and ours.is_ours()
    ours.release()


@pytest.mark.parametrize("number", [None, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS])
@pytest.mark.parametrize("third", [False, True])
def test_who_puts_a_lock_aside_that_is_another_jobs_by_now_gives_it_back(tmp_path, monkeypatch, number, third):
    """With hard links and on file systems without; not where a third job has taken the directory meanwhile."""
    faster, slower, rename = lock(tmp_path), lock(tmp_path), Path.rename

    def rename_and_take(path, aside):
        rename(path, aside)
        assert not third or latest.take() is None

    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    assert faster.take() is None
    latest, stale = lock(tmp_path), {"token": "of a dead job"}
    monkeypatch.setattr(slower, "_read", lambda: stale)
    monkeypatch.setattr(Path, "rename", rename_and_take)
    if number is not None:
        monkeypatch.setattr(os, "link", refused)
    slower._put_aside(stale)
    assert [one.is_ours() for one in (faster, latest)] == [not third, third]
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    monkeypatch.undo()
    faster.release(), latest.release()


def _whose(rank: int, run_dir: Path) -> list[bool]:
    """is_anothers before and while the job holds the directory, after another job took it and after that has ended."""
    ours, found = lock(run_dir), []
    found.append(ours.is_anothers())
    dist.barrier()
    with held(ours):
        found.append(ours.is_anothers())
        for change in (lambda: edit(run_dir / LOCK, token="x"), lambda: (run_dir / LOCK).unlink()):
            dist.barrier()
            change() if rank == 0 else None
            dist.barrier()
            found.append(ours.is_anothers())
        dist.barrier()
    found.append(ours.is_anothers())
    return found


def test_every_rank_can_tell_alone_whether_the_directory_is_another_jobs(tmp_path, run_ranks):
    (tmp_path / "metrics.jsonl").touch()
    assert run_ranks(2)(_whose, tmp_path) == [[False, False, True, True, False]] * 2


def test_how_a_job_ends_that_lost_its_directory_is_not_recorded(tmp_path, monkeypatch):
    ours = lock(tmp_path)
    assert ours.take() is None
    record_end(ours, 76, "a rank is gone")
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 76
    edit(tmp_path / LOCK, token="of another job")
    record_end(ours, 1, "too late")

    def refused(*args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refused)
        record_end(ours, 1, "cannot tell")
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 76
    edit(tmp_path / LOCK, token=ours.token)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", refused)
        patch.setattr(sys, "stderr", SimpleNamespace(write=refused, flush=refused))
        record_end(ours, 1, "nowhere to write")
    ours.release()


def test_many_find_a_stale_lock_and_one_takes_it(tmp_path):
    for _ in range(5):
        (tmp_path / LOCK).write_text(json.dumps({"machine": "another", "pid": 3}))
        os.utime(tmp_path / LOCK, (1, 1))
        locks = [lock(tmp_path) for _ in range(8)]
        answers = [None] * 8
        ready = threading.Barrier(8)

        def take(index, locks=locks, answers=answers, ready=ready):
            ready.wait()
            answers[index] = locks[index].take()

        threads = [threading.Thread(target=take, args=(index,)) for index in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        ours = [each for each in locks if each.is_ours()]
        assert len(ours) == 1 and answers[locks.index(ours[0])] is None
        [each.release() for each in locks]
        assert list(tmp_path.iterdir()) == []


def test_folders_that_nobody_used_go_again(tmp_path):
    ours = lock(tmp_path / "runs/mine")
    assert ours.take() is None
    ours.release()
    assert list(tmp_path.iterdir()) == []
    assert ours.take() is None
    (tmp_path / "runs/mine/recipe.yaml").write_text("x")
    ours.release()
    assert [path.name for path in (tmp_path / "runs/mine").iterdir()] == ["recipe.yaml"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    kind, line = lock(tmp_path / "run").take()
    assert kind == "unwritable" and line.startswith(f"run_dir={tmp_path}/run: No space left on device; free some space")
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_are_refused(tmp_path):
    with Mesh.build(Layout()), other_process(tmp_path):
        with pytest.raises(RunInUse, match="job 41; wait for its end"), held(RunLock(tmp_path)):
            pass
        assert in_use(tmp_path)


def test_the_job_is_named_as_the_cluster_does(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert job_id() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert job_id() == "17"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16"), monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job_id() == "16_3"


def test_a_lock_that_cannot_be_read_at_the_end_changes_no_end(tmp_path, monkeypatch):
    lock = RunLock(tmp_path)
    assert lock.take() is None

    def fail():
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(lock, "_read", fail)
    lock.release()
