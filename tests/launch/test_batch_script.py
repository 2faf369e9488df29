"""The batch script without Slurm: srun, scontrol and the ranks are stand-ins that write down how they are called."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from run_case import write_inputs
from sbtrain.config.load import load
from sbtrain.plan.slurm import Site, batch_script, chain

ROOT = Path(__file__).resolve().parents[2]
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>{calls}
case "$1 $2" in
"show hostnames") echo n1; echo n2 ;;
"show node") echo "NodeName=n1 NodeAddr=10.0.0.1 Port=1" ;;
"show job") echo "JobId=7 JobState={state} Requeue=1 Restarts={restarts} BatchFlag=1" ;;
requeue*) kill -KILL $PPID ;;
esac
"""
SRUN = """#!/bin/bash
echo "srun $*" >>{calls}
echo "$MASTER_ADDR $MASTER_PORT" >>{calls}
trap 'echo "got USR1" >>{calls}; stopped=1' USR1
for _ in $(seq {tenths}); do [ -n "${{stopped:-}}" ] || sleep 0.1; done
[ -z "{code}" ] || echo '{{"code": {code}, "reason": "because"}}' >{run_dir}/exit.json
exit {srun}
"""


class Job:
    """A batch script in a folder of its own."""

    def __init__(self, root: Path):
        self.root, self.run_dir, self.calls_file = root, root / "run", root / "calls"
        recipe = load([f"recipe={write_inputs(root)}", f"run_dir={self.run_dir}", "cluster.gpus_per_node=2"])
        frozen = self.run_dir / "slurm/1"
        (frozen).mkdir(parents=True)
        (frozen / "code").symlink_to(ROOT)
        site = Site(nodes=1)
        template = (ROOT / "launch/slurm/train.sbatch").read_text()
        places = {"frozen": frozen, "python": sys.executable, "work": root}
        script = batch_script(template, recipe, chain(recipe, site, list(recipe.stages))[0], site, **places)
        (root / "job").write_text(script)

    def start(
        self, *, code="", srun=0, state="RUNNING", restarts=0, tenths=0, array=None, **environment
    ) -> subprocess.Popen:
        """Run it; srun takes `tenths` of a second or until USR1, and leaves exit.json with `code`."""
        run_dir = self.run_dir / f"seed_{array}" if array else self.run_dir
        run_dir.mkdir(exist_ok=True)
        values = {"calls": self.calls_file, "code": code, "srun": srun, "tenths": tenths, "run_dir": run_dir}
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (self.root / "bin").mkdir(exist_ok=True)
            path = self.root / "bin" / name
            path.write_text(text.format(**values, state=state, restarts=restarts))
            path.chmod(0o755)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"}
        if array:
            job |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": array}
        return subprocess.Popen(
            ["bash", str(self.root / "job")],
            env={**os.environ, **job, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, **case) -> tuple[int, str]:
        """Exit code (that of a kill where the job was requeued) and output."""
        process = self.start(**case)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    @property
    def calls(self) -> str:
        return self.calls_file.read_text()


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_done(job):
    code, output = job.run(code=0)
    assert code == 0 and "requeue" not in job.calls
    assert "job 7: ctx_32-ctx_128, restart 0, 2 nodes: n1 n2" in output and "code 0: because" in output
    assert "recipe=" in job.calls and "stop_after=ctx_128" in job.calls and "\n10.0.0.1 2" in job.calls


@pytest.mark.parametrize("code", [75, 76, ""])
def test_it_requeues_itself(job, code):
    assert job.run(code=code, srun=137)[0] == -signal.SIGKILL
    assert "scontrol requeue 7\n" in job.calls


@pytest.mark.parametrize("code", [1, 2])
def test_errors_of_its_own_end_the_chain(job, code):
    assert job.run(code=code, srun=1)[0] == 1
    assert "requeue" not in job.calls


@pytest.mark.parametrize("case", [{"state": "CANCELLED"}, {"state": "PENDING"}, {"restarts": 1}])
def test_it_leaves_a_job_alone_that_slurm_has_ended_or_requeued(job, case):
    assert job.run(code=75, srun=75, **case)[0] == 75
    assert "scontrol requeue" not in job.calls


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_ranks(job, number):
    process = job.start(code=75, srun=75, tenths=300)
    while not job.calls_file.exists() or "10.0.0.1" not in job.calls:
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == -signal.SIGKILL and "got USR1" in job.calls
    start = json.loads((job.run_dir / "slurm/starts.jsonl").read_text())
    assert start["signal"] == number.name.removeprefix("SIG") and start["next"] == "again", output


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_before_the_ranks_are_there_starts_none(job, name):
    """What the script calls before it starts them sends it the signal."""
    (job.root / "bin").mkdir()
    (job.root / "bin/rm").write_text(f"#!/bin/bash\nkill -{name} $PPID\n")
    (job.root / "bin/rm").chmod(0o755)
    code, output = job.run(srun=1)
    assert code == -signal.SIGKILL and "srun" not in job.calls, output
    start = json.loads((job.run_dir / "slurm/starts.jsonl").read_text())
    assert start["signal"] == name and start["next"] == "again", output


def test_a_task_of_an_array_has_its_own_run_and_requeues_itself_alone(job):
    assert job.run(code=75, srun=75, array="3")[0] == -signal.SIGKILL
    assert "scontrol requeue 7_3\n" in job.calls
    assert f"run_dir={job.run_dir}/seed_3 seed=3" in job.calls
    assert (job.run_dir / "seed_3/slurm/starts.jsonl").is_file()


def test_what_an_earlier_start_left_is_forgotten(job):
    (job.run_dir / "exit.json").write_text('{"code": 0, "reason": "of an earlier start"}')
    assert job.run(srun=1)[0] == -signal.SIGKILL


def test_ports_differ_from_start_to_start(job):
    job.run(code=0)
    job.run(code=0, SLURM_RESTART_COUNT="1")
    first, second = [line for line in job.calls.splitlines() if line.startswith("10.0.0.1")]
    assert first != second
