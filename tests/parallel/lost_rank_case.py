"""Runs in which one rank is killed, stopped or held up, each rank a process that nobody watches but the other ranks.

A template process imports everything once and forks the ranks of each case: `python lost_rank_case.py` reads cases as
lines of JSON and answers each with the exit code, the seconds until the end and the output of every rank. CUDA does not
survive a fork, so ranks with GPUs are started anew.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import psutil
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
AT_STEP = 1
"""Steps that are done when the fault happens."""

LATE_S = 10
"""How long rank 0's report or the end of its logs takes, in the cases of those names."""
LONG_S = 13
"""How long a rank's part of a checkpoint takes in the case `save`, and how late it is without a reason in `late`."""


class Template:
    """The process that starts ranks; a context."""

    def __init__(self, *, on_gpus: bool = False):
        self._on_gpus = on_gpus

    def __enter__(self):
        hidden = {} if self._on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **hidden}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *exc):
        self._process.stdin.close()
        self._process.wait(20)

    def run(
        self,
        num_ranks: int,
        fault: str,
        bad: int,
        folder: Path,
        args: list[str],
        *,
        before: str = "lasp2",
        limit_s: float = 40,
    ) -> dict:
        """fault: see FAULTS; bad: its rank. args: of launch/train.py. before: whose collective, see PRIMITIVES.
        limit_s: the template kills what is left then.

        Returns codes, texts (stdout and stderr), seconds from the fault to each rank's end, and orphans: the commands
        of the processes that a rank has left behind; all by rank.
        """
        case = dict(num_ranks=num_ranks, fault=fault, bad=bad, folder=str(folder), args=args, limit_s=limit_s)
        case.update(on_gpus=self._on_gpus, before=before)
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    time.sleep(1000)


def spin() -> None:
    while True:
        pass


def fail() -> None:
    raise TypeError("an error of its own")


def report() -> None:
    """Rank 0's report takes longer than ranks wait for one another."""
    import sbtrain.run as run
    from sbtrain.report.page import write_report

    def write_late(folder):
        time.sleep(LATE_S)
        return write_report(folder)

    run.write_report = write_late


def sinks() -> None:
    """Rank 0's logs take longer to end than ranks wait for one another."""
    from sbtrain.metrics.sinks import Sinks

    Sinks.close = lambda self: time.sleep(LATE_S)


def late() -> None:
    time.sleep(LONG_S)


def save() -> None:
    """This rank takes long for its part of the next checkpoint."""
    from sbtrain.checkpoint import store

    write = store.write_files

    def write_late(*args, **kwargs):
        time.sleep(LONG_S)
        return write(*args, **kwargs)

    store.write_files = write_late


FAULTS = {function.__name__: function for function in (kill, stop, sleep, spin, fail, report, sinks, late, save)}
PRIMITIVES = {"lasp2": "all_gather", "zeco": "_scan", "halo": "exchange_rows", "ulysses": "all_to_all"}
"""The function of each file in parallel/sequence/ that calls the other ranks."""


def rank_of_case(rank: int, case: dict, port: int) -> int:
    """One rank: launch/train.py, with a fault before a collective of the second step."""
    from sbtrain.train.watch import Watch

    algorithm, name = importlib.import_module(f"parallel.sequence.{case['before']}"), PRIMITIVES[case["before"]]

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["num_ranks"]), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    done, check, collective = [], Watch.check, getattr(algorithm, name)

    def check_and_count(self, state, **figures):
        check(self, state, **figures)
        done.append(state.step)

    def call_or_fail(*args, **kwargs):
        happened = Path(case["folder"]) / "fault"
        if len(done) == AT_STEP and rank == case["bad"] and case["fault"] and not happened.exists():
            happened.write_text(str(time.time()))
            FAULTS[case["fault"]]()
        return collective(*args, **kwargs)

    Watch.check = check_and_count
    setattr(algorithm, name, call_or_fail)
    code = runpy.run_path(str(ROOT / "launch" / "train.py"))["train"](case["args"])
    names = sorted(thread.name for thread in threading.enumerate())
    print(f"threads: {names}, in a process group: {dist.is_initialized()}", flush=True)
    return code


def start(rank: int, case: dict, port: int) -> int:
    """Start a rank whose output goes to a file; returns its process id."""
    out = os.open(Path(case["folder"]) / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if case["on_gpus"]:
        command = [sys.executable, __file__, str(rank), str(port), json.dumps(case)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True).pid
    pid = os.fork()
    if pid:
        os.close(out)
        return pid
    os.setsid()
    os.dup2(out, 1)
    os.dup2(out, 2)
    return end_with(rank, case, port)


def end_with(rank: int, case: dict, port: int) -> NoReturn:
    """Be that rank, and end without what the interpreter does at its end: the template's things are not the rank's."""
    code = 1
    try:
        code = rank_of_case(rank, case, port)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_case(case: dict) -> dict:
    """Start the ranks and wait until all but a rank that hangs by itself have ended; then end that one too."""
    folder, orphans = Path(case["folder"]), {}
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {start(rank, case, port): rank for rank in range(case["num_ranks"])}
    codes, ends, deadline = {}, {}, time.time() + case["limit_s"]
    while running and time.time() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = running.pop(pid)
            codes[rank], ends[rank] = os.waitstatus_to_exitcode(status), time.time()
            orphans[rank] = end_session(pid)
        elif case["fault"] == "stop" and list(running.values()) == [case["bad"]]:
            break
        else:
            time.sleep(0.05)
    for pid, rank in running.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[rank], ends[rank] = "hangs", time.time()
        orphans[rank] = end_session(pid)
    fault = folder / "fault"
    at = float(fault.read_text()) if fault.exists() else time.time()
    ranks = range(case["num_ranks"])
    texts = [(folder / f"rank_{rank}.txt").read_text(errors="replace") for rank in ranks]
    return {
        "codes": [codes[rank] for rank in ranks],
        "texts": texts,
        "seconds": [ends[rank] - at for rank in ranks],
        "orphans": [orphans[rank] for rank in ranks],
    }


def end_session(leader: int) -> list[str]:
    """Kill what is left of the session of a process that has ended. Returns the commands."""
    left = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        try:
            if os.getsid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.info["cmdline"] or []))
                process.kill()
        except (OSError, psutil.Error):
            continue
    return left


def main() -> None:
    """Answer cases until the input ends; or be a rank."""
    sys.path[:0] = [str(ROOT / "launch"), str(ROOT)]
    if sys.argv[1:]:
        rank, port, case = sys.argv[1:]
        end_with(int(rank), json.loads(case), int(port))
    for line in sys.stdin:
        case = json.loads(line)
        if not case["on_gpus"]:
            import sbtrain.run  # noqa: F401
        print(json.dumps(run_case(case)), flush=True)


if __name__ == "__main__":
    main()
