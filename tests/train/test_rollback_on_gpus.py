"""A run on GPUs goes back to a snapshot in pinned memory: the run that went back to a checkpoint, to the last bit."""

from __future__ import annotations

import pytest

from run_case import curve, tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit
from test_rollback import ONE_STAGE, ROLLBACK, rollbacks, run_spiking

TIMEOUT_S = 400.0  # kernels compile
KERNEL_SIZES = ("precision=bf16", "model.hidden_size=256", "model.head_dim=64", "model.ffn_size=384")
ALONE = ("stages.ctx_64.layout.pp=1", "stages.ctx_128.layout.sp=1")
DISK = ("checkpoint.every_steps=7",)
MEMORY = ("checkpoint.every_steps=0", "checkpoint.asynchronous=true", "checkpoint.snapshot_every_steps=7")
GPUS = [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multigpu)]


@pytest.mark.parametrize("num_gpus", GPUS)
def test_from_pinned_memory(tmp_path, run_ranks, num_gpus):
    write_inputs(tmp_path)
    ranks = run_ranks(num_gpus, backend="nccl", timeout_s=TIMEOUT_S)
    for name, options in (("disk", DISK), ("memory", MEMORY)):
        recipe = tiny_recipe(tmp_path, name, *ONE_STAGE, *ALONE, *ROLLBACK, *KERNEL_SIZES, *options)
        assert ranks(run_spiking, recipe, [32]) == [Exit.DONE] * num_gpus
        (said,) = rollbacks(tmp_path / name)
        assert [said[key] for key in ("step", "from_step", "first_sample", "num_samples")] == [7, 8, 28, 4]
    assert curve(tmp_path / "memory") == curve(tmp_path / "disk")
    assert [step[0] for step in curve(tmp_path / "memory")] == list(range(1, 11))
