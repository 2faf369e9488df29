"""Chains of jobs on a real Slurm of two nodes: what is interrupted goes on by itself and ends as if it had not been."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from run_case import curve, write_inputs
from slurm_cluster import NODES, Cluster, wait_for

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
STEPS, LATER_STEPS, EVERY = 200, 10, 40
RECIPE = (
    *("~stages.ctx_128", f"stages.ctx_64.tokens={128 * LATER_STEPS}"),
    *("stages.ctx_64.num_nodes=1", "stages.ctx_64.layout.pp=1", f"checkpoint.every_steps={EVERY}"),
    *("cluster.gpus_per_node=1", "nodes=2", "runtime.timeout_s=60", "evaluation.tokens=0"),
)
TRAINING = r"^\S*python\S* \S*launch/train\.py"


class Submitted:
    """A chain in the queue and its run directory."""

    def __init__(self, cluster: Cluster, root: Path, *overrides: str, steps: int = STEPS):
        self.cluster, self.run_dir = cluster, root / "run"
        self.command = [
            *("bash", str(ROOT / "launch/slurm/submit.sh"), f"recipe={root / 'tiny.yaml'}", f"run_dir={self.run_dir}"),
            *(*RECIPE, f"stages.ctx_32.tokens={128 * steps}", *overrides),
        ]
        if not (root / "tiny.yaml").exists():
            root.mkdir(parents=True, exist_ok=True)
            write_inputs(root)
        self.again()

    def again(self) -> None:
        """The same command."""
        environment = {**self.cluster.environment, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        command = {"env": environment, "cwd": self.run_dir.parent, "capture_output": True, "text": True}
        done = subprocess.run(self.command, **command, timeout=120)
        assert done.returncode == 0, done.stderr
        self.jobs = re.findall(r"^job (\d+):", done.stdout, re.M)

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def trains(self, step: int = EVERY + 5) -> None:
        """Wait until that step is done."""
        wait_for(lambda: self.step >= step, limit_s=120, what=f"step {step}; {self.log}")

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.run_dir.glob("slurm/*/*.log")))

    @property
    def starts(self) -> list[dict]:
        """What the batch scripts kept of every start."""
        return [json.loads(line) for line in (self.run_dir / "slurm/starts.jsonl").read_text().splitlines()]

    def completes(self) -> None:
        """Wait for the end of the whole chain, which must be a good one."""
        states = self.cluster.ended(*self.jobs, limit_s=240)
        assert states == ["COMPLETED"] * len(self.jobs), self.log
        assert json.loads((self.run_dir / "exit.json").read_text()) == {"code": 0, "reason": "all stages are done"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> Submitted:
    """A chain that nothing happens to: a stage on two nodes, then one on one node."""
    chain = Submitted(cluster, tmp_path_factory.mktemp("undisturbed"))
    chain.completes()
    return chain


@pytest.fixture
def chain(cluster, undisturbed, tmp_path) -> Submitted:
    """The same chain, in training."""
    chain = Submitted(cluster, tmp_path)
    yield chain
    for job in chain.jobs:
        subprocess.run(["scancel", job], env=cluster.environment, capture_output=True)
    wait_for(lambda: not cluster.processes(TRAINING), limit_s=60, what="the end of all ranks")


def assert_equal_to(undisturbed: Submitted, chain: Submitted) -> None:
    """Every step, loss, gradient norm and learning rate."""
    assert curve(chain.run_dir) == curve(undisturbed.run_dir)
    assert [line[0] for line in curve(chain.run_dir)] == list(range(1, STEPS + LATER_STEPS + 1))


def test_a_chain_of_stages_on_different_nodes(undisturbed):
    assert len(undisturbed.jobs) == 2
    assert [start["next"] for start in undisturbed.starts] == ["done", "done"]
    assert [start["nodes"] for start in undisturbed.starts] == ["n[1-2]", "n1"]
    assert "restart 0, 2 nodes: n1 n2" in undisturbed.log
    worlds = [json.loads(line)["world_size"] for line in (undisturbed.run_dir / "metrics.jsonl").open()]
    assert worlds == [2] * STEPS + [1] * LATER_STEPS
    assert (undisturbed.run_dir / "slurm/1/code/launch/train.py").is_file()


def test_preempted(cluster, undisturbed, chain):
    chain.trains()
    cluster.slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.restarted(chain.jobs[0], restarts=1)
    chain.completes()
    first = chain.starts[0]
    assert (first["code"], first["signal"], first["next"]) == (75, "USR1", "again")
    assert_equal_to(undisturbed, chain)


def test_a_rank_is_killed(cluster, undisturbed, chain):
    chain.trains()
    os.kill(cluster.processes(TRAINING)[-1], signal.SIGKILL)
    cluster.restarted(chain.jobs[0], restarts=1)
    chain.completes()
    assert (chain.starts[0]["code"], chain.starts[0]["next"]) == (76, "again")
    assert "rank " in chain.starts[0]["reason"]
    assert_equal_to(undisturbed, chain)


def test_the_batch_shell_is_killed(cluster, undisturbed, chain):
    """Slurm takes that for the job's own failure: the chain ends whole, and the same command goes on with it."""
    chain.trains()
    os.kill(cluster.processes(r"bash \S*slurm_script")[0], signal.SIGKILL)
    assert cluster.ended(*chain.jobs) == ["FAILED", "CANCELLED"]
    wait_for(lambda: not cluster.processes(TRAINING), limit_s=60, what="the end of all ranks")
    chain.again()
    chain.completes()
    assert_equal_to(undisturbed, chain)


def test_a_slurmd_is_killed(cluster, undisturbed, chain):
    """Slurm gives the node up and requeues the job; its ranks end themselves before the job comes back."""
    chain.trains()
    process = int((cluster.root / "slurmd-n2.pid").read_text())
    os.kill(process, signal.SIGKILL)
    try:
        wait_for(lambda: cluster.job(chain.jobs[0])["JobState"] == "PENDING", limit_s=60, what="requeue by Slurm")
        wait_for(lambda: not cluster.processes(TRAINING), limit_s=90, what="the end of all ranks")
    finally:
        cluster.start_node(NODES[1])
    cluster.restarted(chain.jobs[0], restarts=1, limit_s=90)
    chain.completes()
    assert_equal_to(undisturbed, chain)


def test_the_time_limit_then_scancel(cluster, tmp_path):
    """The first saves and starts again, the second ends the chain."""
    chain = Submitted(cluster, tmp_path, "sbatch.time=2", "grace_s=30", steps=20_000)
    cluster.restarted(chain.jobs[0], restarts=1, limit_s=240)
    first = chain.starts[0]
    assert (first["code"], first["signal"], first["next"]) == (75, "USR1", "again")
    chain.trains(first["step"] + 5)
    cluster.slurm("scancel", chain.jobs[0])
    assert cluster.ended(*chain.jobs) == ["CANCELLED", "CANCELLED"]
    wait_for(lambda: not cluster.processes(TRAINING), limit_s=60, what="the end of all ranks")
    assert cluster.job(chain.jobs[0])["Restarts"] == "1"
    assert [line[0] for line in curve(chain.run_dir)] == list(range(1, chain.step + 1))


def test_the_same_chain_twice(cluster, chain):
    """The second would train in the run directory of the first."""
    environment = {**cluster.environment, "PYTHON": sys.executable}
    done = subprocess.run(chain.command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"is queued already as job {', '.join(chain.jobs)}; scancel it first" in done.stderr
