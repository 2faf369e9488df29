"""A signal that comes while no step is trained ends the start at once, with 75, and says why if there is a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from parallel.told import SIGNALS
from run_case import write_inputs
from told_case import ROOT, STAYS_S

CASE = Path(__file__).with_name("told_case.py")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("told")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def template():
    """The process that forks ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, str(CASE)], text=True, env=environment, **pipes) as process:
        yield process
        process.stdin.close()


def start(template: subprocess.Popen, root: Path, where: str, num_ranks: int, name: str = "") -> tuple[list[int], Path]:
    """Send ranks to a place; their process ids, and where they say that they are there."""
    folder = root / (name or where)
    folder.mkdir()
    case = [where, num_ranks, str(folder), f"recipe={root / 'tiny.yaml'}", f"run_dir={folder / 'run'}"]
    template.stdin.write(json.dumps([*case, "runtime.timeout_s=20"]) + "\n")
    template.stdin.flush()
    return json.loads(template.stdout.readline()), folder


def wait_for(path: Path) -> None:
    end = time.monotonic() + 40
    while not path.exists():
        assert time.monotonic() < end, f"{path.name}: {[each.read_text() for each in path.parent.glob('rank_*.txt')]}"
        time.sleep(0.02)


def codes(template: subprocess.Popen) -> list[int]:
    return json.loads(template.stdout.readline())


def exit_of(folder: Path) -> dict:
    return json.loads((folder / "run" / "exit.json").read_text())


@pytest.mark.parametrize(("num_ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_before_the_first_step_one_rank_that_is_told_ends_all(template, inputs, num_ranks, number):
    """Also one whose main thread is in a collective, where Python calls no handler."""
    pids, folder = start(template, inputs, "verification", num_ranks, number.name)
    for rank in range(num_ranks):
        wait_for(folder / f"there_{rank}")
    began = time.monotonic()
    os.kill(pids[-1], number)
    assert codes(template) == [75] * num_ranks
    assert time.monotonic() - began < STAYS_S / 3
    assert exit_of(folder) == {"code": 75, "reason": f"{number.name}, while no step was trained"}
    said = "".join((folder / f"rank_{rank}.txt").read_text() for rank in range(num_ranks))
    assert said.count(f"stopped: {number.name}, while no step was trained\n") == 1 and "Traceback" not in said
    assert not (folder / "run" / "stacks").exists()


def test_what_an_earlier_start_left_is_replaced_before_the_run_directory_is_held(template, inputs):
    pids, folder = start(template, inputs, "opening", 1)
    wait_for(folder / "there_0")
    os.kill(pids[0], signal.SIGTERM)
    assert codes(template) == [75]
    assert exit_of(folder) == {"code": 75, "reason": "SIGTERM, while no step was trained"}


def test_neither_a_file_system_that_hangs_nor_a_process_below_keeps_it(template, inputs):
    pids, folder = start(template, inputs, "hanging", 1)
    wait_for(folder / "there_0")
    began = time.monotonic()
    os.kill(pids[0], signal.SIGTERM)
    assert codes(template) == [75] and time.monotonic() - began < STAYS_S / 3
    assert not psutil.pid_exists(int((folder / "started").read_text()))


def test_all_leave_the_process_group_and_rank_0_says_how_its_report_ended(template, inputs):
    """Rank 0 goes on alone then: its report is stopped, and the next start writes it."""
    pids, folder = start(template, inputs, "report", 2)
    wait_for(folder / "there_0")
    wait_for(folder / "ended_1")
    assert "initialized: False" in (folder / "rank_0.txt").read_text() and (folder / "ended_0").exists()
    os.kill(pids[0], signal.SIGTERM)
    assert codes(template) == [75, 0]
    assert exit_of(folder) == {"code": 75, "reason": "SIGTERM, while no step was trained"}


def test_a_signal_while_exit_json_is_written_changes_nothing(template, inputs):
    pids, folder = start(template, inputs, "writing", 1)
    wait_for(folder / "there_0")
    for number in SIGNALS:
        os.kill(pids[0], number)
    assert codes(template) == [0] and exit_of(folder) == {"code": 0, "reason": "done"}


def test_a_signal_while_python_still_imports_asks_for_another_start(inputs):
    """As soon as the program catches signals, which is before it has a run directory."""
    command = [sys.executable, str(ROOT / "launch/train.py"), f"recipe={inputs / 'tiny.yaml'}"]
    process = subprocess.Popen(command, cwd=inputs, stderr=subprocess.PIPE, text=True)
    caught = 0
    while not caught & 1 << signal.SIGTERM - 1:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "stopped: SIGTERM, while no step was trained\n"
    assert process.returncode == 75 and not (inputs / "runs").exists()
