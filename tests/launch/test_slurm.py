"""Chains of jobs on a real Slurm of two nodes: what is interrupted goes on by itself and ends as if it had not been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from run_case import curve, write_inputs
from slurm_cluster import NODES, Cluster, wait_for

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not shutil.which("slurmctld"), reason="no Slurm here: apt-get install slurm-wlm munge"),
]

ROOT = Path(__file__).resolve().parents[2]
STEPS, LATER_STEPS, EVERY = 200, 10, 40
RECIPE = (
    *("~stages.ctx_128", f"stages.ctx_64.tokens={128 * LATER_STEPS}"),
    *("stages.ctx_64.num_nodes=1", "stages.ctx_64.layout.pp=1", f"checkpoint.every_steps={EVERY}"),
    *("cluster.gpus_per_node=1", "runtime.timeout_s=60", "evaluation.tokens=0"),
)
FIRST_STAGE = "stop_after=ctx_32"
TRAINING = r"^\S*python\S* .*/launch/train\.py"
START_S, RUN_S = 180, 420
"""What a start of two ranks and a whole chain may take on two busy cores; alone they take a tenth."""


class Submitted:
    """A chain in the queue and its run directory."""

    def __init__(self, cluster: Cluster, root: Path, *overrides: str, steps=STEPS, nodes=2, checkout: Path = ROOT):
        self.cluster, self.run_dir = cluster, root / "run"
        self.command = [
            *("bash", str(checkout / "launch/slurm/submit.sh"), f"recipe={root / 'tiny.yaml'}"),
            *(f"run_dir={self.run_dir}", f"nodes={nodes}", *RECIPE, f"stages.ctx_32.tokens={128 * steps}", *overrides),
        ]
        if not (root / "tiny.yaml").exists():
            root.mkdir(parents=True, exist_ok=True)
            write_inputs(root)
        self.again()

    def again(self) -> None:
        """The same command."""
        environment = {**self.cluster.environment, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        command = {"env": environment, "cwd": self.run_dir.parent, "capture_output": True, "text": True}
        done = subprocess.run(self.command, **command, timeout=START_S)
        assert done.returncode == 0, done.stderr
        self.jobs = re.findall(r"^job (\d+):", done.stdout, re.M)

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be half written
        return json.loads(lines[-1])["step"] if lines else 0

    def trains(self, step: int = EVERY + 5) -> None:
        """Wait until that step is done."""
        wait_for(lambda: self.step >= step, limit_s=START_S, what=f"step {step} in {self.run_dir}")

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.run_dir.glob("slurm/*/*.log")))

    @property
    def starts(self) -> list[dict]:
        """What the batch scripts kept of every start."""
        return [json.loads(line) for line in (self.run_dir / "slurm/starts.jsonl").read_text().splitlines()]

    def completes(self) -> None:
        """Wait for the end of the whole chain, which must be a good one."""
        states = self.cluster.ended(*self.jobs, limit_s=RUN_S)
        assert states == ["COMPLETED"] * len(self.jobs), self.log
        assert json.loads((self.run_dir / "exit.json").read_text())["code"] == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> Submitted:
    """A chain that nothing happens to: a stage on two nodes, then one on one node. Its checkout is gone at once."""
    root = tmp_path_factory.mktemp("undisturbed")
    for name in ("launch", "ops", "parallel", "sbtrain", "recipes"):
        shutil.copytree(ROOT / name, root / "checkout" / name)
    chain = Submitted(cluster, root / "a path", checkout=root / "checkout")
    shutil.rmtree(root / "checkout")
    chain.completes()
    return chain


@pytest.fixture
def submit(cluster, tmp_path):
    """Submits a chain, of the first stage alone where nothing else is said; nothing of it stays."""
    chains = []

    def submitted(*overrides: str, **case) -> Submitted:
        chains.append(Submitted(cluster, tmp_path, *overrides, **case))
        return chains[-1]

    yield submitted
    for job in (job for chain in chains for job in chain.jobs):
        subprocess.run(["scancel", job], env=cluster.environment, capture_output=True)
    no_ranks(cluster)


def no_ranks(cluster: Cluster) -> None:
    wait_for(lambda: not cluster.processes(TRAINING), limit_s=120, what="the end of all ranks")


def assert_equal(run_dir: Path, undisturbed: Submitted, *, steps: int = STEPS) -> None:
    """Every step, loss, gradient norm and learning rate."""
    assert curve(run_dir) == curve(undisturbed.run_dir)[:steps]
    assert [line[0] for line in curve(run_dir)] == list(range(1, steps + 1))


def test_a_chain_of_stages_on_different_nodes(undisturbed):
    assert len(undisturbed.jobs) == 2
    assert [start["next"] for start in undisturbed.starts] == ["done", "done"]
    assert [start["nodes"] for start in undisturbed.starts] == ["n[1-2]", "n1"]
    assert "restart 0, 2 nodes: n1 n2" in undisturbed.log and "\x1b" not in undisturbed.log
    worlds = [json.loads(line)["world_size"] for line in (undisturbed.run_dir / "metrics.jsonl").open()]
    assert worlds == [2] * STEPS + [1] * LATER_STEPS
    end = json.loads((undisturbed.run_dir / "exit.json").read_text())
    assert end == {"code": 0, "reason": "all stages are done"}


def test_preempted(cluster, undisturbed, submit):
    chain = submit()
    chain.trains()
    cluster.slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.restarted(chain.jobs[0], restarts=1, limit_s=START_S)
    chain.completes()
    first = chain.starts[0]
    assert (first["code"], first["signal"], first["next"]) == (75, "USR1", "again")
    assert_equal(chain.run_dir, undisturbed, steps=STEPS + LATER_STEPS)


def test_a_rank_is_killed(cluster, undisturbed, submit):
    chain = submit(FIRST_STAGE)
    chain.trains()
    os.kill(cluster.processes(TRAINING)[-1], signal.SIGKILL)
    cluster.restarted(chain.jobs[0], restarts=1, limit_s=START_S)
    chain.completes()
    assert (chain.starts[0]["code"], chain.starts[0]["next"]) == (76, "again")
    assert "rank " in chain.starts[0]["reason"]
    assert_equal(chain.run_dir, undisturbed)


def test_the_batch_shell_is_killed(cluster, undisturbed, submit):
    """Slurm takes that for the job's own failure: the chain ends whole, and the same command goes on with it."""
    chain = submit()
    chain.trains()
    os.kill(cluster.processes(r"bash \S*slurm_script")[0], signal.SIGKILL)
    assert cluster.ended(*chain.jobs, limit_s=START_S) == ["FAILED", "CANCELLED"]
    no_ranks(cluster)
    chain.again()
    chain.completes()
    assert_equal(chain.run_dir, undisturbed, steps=STEPS + LATER_STEPS)


def test_a_slurmd_is_killed(cluster, undisturbed, submit):
    """Slurm gives the node up and requeues the job; the rank there outlives that, and ends itself."""
    chain = submit(FIRST_STAGE)
    chain.trains()
    ranks = cluster.processes(TRAINING)
    os.kill(int((cluster.root / "slurmd-n2.pid").read_text()), signal.SIGKILL)
    try:
        for rank in ranks:  # the run must not be over before Slurm notices
            os.kill(rank, signal.SIGSTOP)
        wait_for(lambda: cluster.job(chain.jobs[0])["JobState"] == "PENDING", limit_s=120, what="requeue by Slurm")
        left = cluster.processes(TRAINING)
        assert left and set(left) < set(ranks)
    finally:
        for rank in cluster.processes(TRAINING):
            os.kill(rank, signal.SIGCONT)
    no_ranks(cluster)
    cluster.start_node(NODES[1])
    cluster.restarted(chain.jobs[0], restarts=1, limit_s=START_S)
    chain.completes()
    assert_equal(chain.run_dir, undisturbed)


def test_the_time_limit_then_scancel(cluster, submit):
    """The first saves and starts again, the second ends the chain for good."""
    chain = submit("sbatch.time=60", "grace_s=30", steps=20_000)
    chain.trains()
    cluster.slurm("scontrol", "update", f"JobId={chain.jobs[0]}", "EndTime=now+40seconds")
    cluster.restarted(chain.jobs[0], restarts=1, limit_s=START_S)
    first = chain.starts[0]
    assert (first["code"], first["signal"], first["next"]) == (75, "USR1", "again")
    cluster.slurm("scontrol", "update", f"JobId={chain.jobs[0]}", "TimeLimit=60")
    chain.trains(first["step"] + 5)
    cluster.slurm("scancel", chain.jobs[0])
    assert cluster.ended(*chain.jobs, limit_s=START_S) == ["CANCELLED", "CANCELLED"]
    no_ranks(cluster)
    assert cluster.job(chain.jobs[0])["Restarts"] == "1"
    assert [line[0] for line in curve(chain.run_dir)] == list(range(1, chain.step + 1))


def test_an_array_of_seeds(cluster, submit):
    """Each is a run of its own: the one whose rank is killed starts again, the other does not notice."""
    chain = submit(FIRST_STAGE, "array=3-4", nodes=1)
    tasks = {seed: chain.run_dir / f"seed_{seed}" for seed in (3, 4)}
    rank = wait_for(lambda: cluster.processes(f"{TRAINING}.*seed_3 "), limit_s=START_S, what="the rank of seed 3")[0]
    os.kill(rank, signal.SIGKILL)
    states = cluster.ended(*(f"{chain.jobs[0]}_{seed}" for seed in tasks), limit_s=RUN_S)
    assert states == ["COMPLETED", "COMPLETED"], chain.log
    starts = {seed: (folder / "slurm/starts.jsonl").read_text().splitlines() for seed, folder in tasks.items()}
    assert [json.loads(line)["restart"] for line in starts[3]] == ["0", "1"] and len(starts[4]) == 1
    losses = {seed: [line[3] for line in curve(folder)] for seed, folder in tasks.items()}
    assert len(losses[3]) == len(losses[4]) == STEPS and losses[3] != losses[4]
    environment = {**cluster.environment, "PYTHON": sys.executable}
    done = subprocess.run(chain.command, env=environment, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 2 and "all stages are done; nothing is submitted" in done.stderr


def test_the_same_chain_twice(cluster, submit):
    """The second would train in the run directory of the first."""
    chain = submit("sbatch.begin=now+1hour")
    environment = {**cluster.environment, "PYTHON": sys.executable}
    done = subprocess.run(chain.command, env=environment, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"is queued already as job {', '.join(chain.jobs)}; scancel it first" in done.stderr
