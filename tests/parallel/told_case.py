"""Ranks that are told to stop where no step is trained: `python told_case.py` reads cases as lines of JSON.

A case is [place, number of ranks, folder, *arguments of launch/train.py]. Everything is imported once and the ranks are
forked; the answers are their process ids, then their exit codes. A rank that has come to the place writes
FOLDER/there_RANK; rank 0 stays there in Python, the others in a collective that waits for it.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
STAYS_S = 60


def stay(folder: Path, rank: int, *, wait: bool = True) -> None:
    """Be in the place, until something ends this rank."""
    import torch.distributed as dist

    print(f"initialized: {dist.is_initialized()}", flush=True)
    (folder / f"there_{rank}").touch()
    if rank and wait:
        dist.barrier()
    time.sleep(STAYS_S)


def verification(folder: Path, rank: int) -> None:
    """While checkpoints are read, before the first step."""
    import sbtrain.run as run

    run.recover = lambda *args: stay(folder, rank)


def opening(folder: Path, rank: int) -> None:
    """Where ranks wait for the others' processes to appear; an earlier start has left how it ended."""
    import sbtrain.run as run

    (folder / "run").mkdir()
    (folder / "run" / "exit.json").write_text('{"code": 0, "reason": "stage a is done, b comes next"}')
    run.watched = lambda *args: stay(folder, rank, wait=False)


def hanging(folder: Path, rank: int) -> None:
    """As `opening`, on a file system that stands still, with a process that this one has started."""
    import sbtrain.checkpoint.run_dir as run_dir
    from parallel import told

    told.LIMIT_S = 0.5
    opening(folder, rank)
    run_dir.write_json = lambda path, value: time.sleep(STAYS_S)
    process = subprocess.Popen(["sleep", str(STAYS_S)])
    (folder / "started").write_text(str(process.pid))


def report(folder: Path, rank: int) -> None:
    """In rank 0's report; nothing has to be trained. The others end as they always do."""
    import sbtrain.run as run

    skip_training(run)
    end, ended = run.end_distributed, folder / f"ended_{rank}"
    run.end_distributed = lambda: (end(), ended.touch())
    run.finish = lambda recipe, ledger: stay(folder, rank, wait=False)


def writing(folder: Path, rank: int) -> None:
    """While exit.json is being written."""
    import sbtrain.checkpoint.run_dir as run_dir
    import sbtrain.run as run

    skip_training(run)
    run.finish = lambda recipe, ledger: None
    write_json = run_dir.write_json

    def write_late(path: Path, value) -> None:
        (folder / f"there_{rank}").touch()
        time.sleep(2)
        write_json(path, value)

    run_dir.write_json = write_late


def skip_training(run) -> None:
    """A run that is done."""
    from sbtrain.checkpoint.ledger import Ledger, empty

    def prepare(recipe):
        (Path(recipe.run_dir) / "metrics.jsonl").touch()
        return recipe, Ledger(Path(recipe.run_dir), {**empty(), "stages_done": list(recipe.stages)}), None

    run.prepare, run.carry = prepare, lambda *args: (run.Exit.DONE, "done")


PLACES = {function.__name__: function for function in (verification, opening, hanging, report, writing)}


def be_rank(rank: int, num_ranks: int, port: int, where: str, folder: Path, args: list[str]) -> NoReturn:
    """launch/train.py as a program of its own would be."""
    from parallel.told import told

    code = 1
    try:
        out = os.open(folder / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )  # fmt: skip
        told.listen()
        PLACES[where](folder, rank)
        code = runpy.run_path(str(ROOT / "launch" / "train.py"))["train"](args)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def main() -> None:
    """Answer cases until the input ends: start the ranks and wait for them."""
    sys.path[:0] = [str(ROOT / "launch"), str(ROOT)]
    import sbtrain.run  # noqa: F401

    for line in sys.stdin:
        where, num_ranks, folder, *args = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = [os.fork() or be_rank(rank, num_ranks, port, where, Path(folder), args) for rank in range(num_ranks)]
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
