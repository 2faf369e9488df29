"""Fixtures of all tests: seeds, poisoned memory, skips that name the missing device, ranks for parallel code."""

from __future__ import annotations

import random
import shutil

import numpy
import pytest
import torch

from autotuning import shorten
from rank_pool import RankPool, poison_memory


def pytest_runtest_setup(item):
    """Skip what this machine cannot run, with the reason."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if item.get_closest_marker("gpu") and num_gpus < 1:
        pytest.skip("needs one CUDA GPU; none is visible")
    multigpu = item.get_closest_marker("multigpu")
    wanted = (multigpu.args[0] if multigpu.args else 2) if multigpu else 0
    if num_gpus < wanted:
        pytest.skip(f"needs {wanted} CUDA GPUs; {num_gpus} visible")
    lacking = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if item.get_closest_marker("slurm") and lacking:
        pytest.skip(f"needs slurm-wlm and munge; not on PATH: {', '.join(lacking)}")


@pytest.fixture(autouse=True)
def _seeds_and_poison(request):
    """Same seed for every test; torch.empty gives NaN, except on a GPU, where that mode would change the kernels."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    on_gpu = request.node.get_closest_marker("gpu") or request.node.get_closest_marker("multigpu")
    poison_memory(not on_gpu)
    if on_gpu:
        shorten()
    yield
    poison_memory(False)


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(n)(function, *args, **kwargs) -> [function(rank, *args, **kwargs) for every rank of n processes].

    function is a module-level function; arguments and results are pickled. torch.distributed is initialized when it
    is called (gloo on CPU, or backend="nccl" with one GPU a rank); groups it makes it also destroys. What a rank
    raises is raised in the test, with that rank's traceback. timeout_s bounds one case.
    """
    pools = {}

    def ranks(num_ranks: int, *, backend: str = "gloo", timeout_s: float = 120.0):
        pool = pools.setdefault((num_ranks, backend), RankPool(num_ranks, backend))

        def call(function, *args, **kwargs):
            return pool.run(function, args, kwargs, timeout_s)

        return call

    yield ranks
    for pool in pools.values():
        pool.stop()


@pytest.fixture
def site(tmp_path, monkeypatch, capfd):
    """A folder with a tiny recipe and its inputs, in which launch/train.py can be called: see command_line.Site."""
    from command_line import ROOT, Site

    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.chdir(tmp_path)
    return Site(tmp_path, capfd)
