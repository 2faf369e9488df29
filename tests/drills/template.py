"""A process that imports everything once and forks the ranks of every start from it.

It reads starts as lines of JSON and answers each with the ranks' exit codes and outputs. Every rank is a process and a
session of its own that runs launch/train.py over gloo and without torchrun; its writer is forked from it, too, where
otherwise it would import torch.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 150.0
"""What a start may take at most, on a machine that is busy with other things."""


class Template:
    """The process that starts ranks; a context."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        folders = [str(ROOT / folder) for folder in ("launch", "", "tests", "tests/parallel")]
        code = f"import sys; sys.path[:0] = {folders}; from drills import template; template.main()"
        command = [sys.executable, "-c", code]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *exc):
        self._process.stdin.close()
        self._process.wait(60)

    def start(self, num_ranks: int, folder: Path, args: list[str], *, fault=None, **places) -> dict:
        """args: of launch/train.py. fault: a drills.points.Fault; places: paths that it needs.

        Returns codes and texts (stdout and stderr) by rank, left: the commands of processes that a rank which was not
        killed has left behind, and fault: what happened where.
        """
        case = dict(num_ranks=num_ranks, folder=str(folder), args=args, fault=fault and asdict(fault))
        case.update({key: str(path) for key, path in places.items()})
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Forked:
    """What WriterProcess needs of a subprocess.Popen, for a writer that is forked."""

    def __init__(self, command: list[str], *, pass_fds: tuple[int, ...], stdin: int):
        self.pid, self._code = os.fork(), None
        if self.pid:
            return
        code = 1
        try:
            keep = {0, 1, 2, *pass_fds}
            for name in os.listdir("/proc/self/fd"):
                if int(name) not in keep:
                    with suppress(OSError):
                        os.close(int(name))
            if points is not None:
                points.enter_writer()
            from sbtrain.checkpoint import writer

            writer.main(*map(int, command[-3:]))
            code = 0
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code of a process that has ended."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, limit_s: float = 60.0) -> int:
        """Wait for its end."""
        end = time.monotonic() + limit_s
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("writer", limit_s)
            time.sleep(0.01)
        return self._code

    def kill(self) -> None:
        """End it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


points = None
"""Of this process, once it is a rank with a fault."""


def rank_of_case(rank: int, case: dict, port: int) -> int:
    """One rank: launch/train.py, with a fault at one of its points."""
    global points
    from drills.points import Fault, Points
    from sbtrain.checkpoint import writing

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["num_ranks"]), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    Path(case["folder"], f"pid_{rank}").write_text(str(os.getpid()))
    writing.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})
    if case["fault"]:
        points = Points(Fault(**case["fault"]), rank, case)
        points.install()
    return runpy.run_path(str(ROOT / "launch" / "train.py"))["train"](case["args"])


def fork_rank(rank: int, case: dict, port: int) -> int:
    """Fork a rank whose output goes to a file; returns its process id."""
    out = os.open(Path(case["folder"]) / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(out, 2)
        end_with(rank, case, port)
    os.close(out)
    return pid


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


def free_port() -> int:
    """Below those that systems give to outgoing connections, which may take one before a rank listens there."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def run_case(case: dict) -> dict:
    """Start the ranks and wait until they have ended. What killed ones have left goes on until the next answer."""
    from lost_rank_case import end_session

    folder, codes, left = Path(case["folder"]), {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running = {fork_rank(rank, case, port): rank for rank in range(case["num_ranks"])}
    deadline = time.monotonic() + LIMIT_S
    while running and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            rank = running.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            left[rank] = end_session(pid) if codes[rank] != -signal.SIGKILL else []
        elif not pid:
            time.sleep(0.02)
    for pid, rank in running.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[rank], left[rank] = "hangs", end_session(pid)
    ranks, happened = range(case["num_ranks"]), folder / "fault"
    return {
        "codes": [codes[rank] for rank in ranks],
        "texts": [(folder / f"rank_{rank}.txt").read_text(errors="replace") for rank in ranks],
        "left": [left[rank] for rank in ranks],
        "fault": happened.read_text().splitlines() if happened.exists() else [],
    }


def main() -> None:
    """Answer starts until the input ends."""
    import sbtrain.run  # noqa: F401
    from sbtrain.config.load import load

    load(["recipe=7b_cpt", "dry_run=true"])  # what it imports and its parser learns takes every rank a second otherwise
    for line in sys.stdin:
        print(json.dumps(run_case(json.loads(line))), flush=True)
    os._exit(0)  # what the interpreter does at its end takes seconds
