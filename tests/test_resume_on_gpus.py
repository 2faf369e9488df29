"""Runs on GPUs that stop and go on: with runtime.deterministic, as they are, to the last bit; see resume_case.

bf16, by our kernels and cuBLAS, with packed documents, windows, gated linear attention, full attention, pairs, meta
tokens, experts and a warm-in of spikes; over NCCL with tensor, pipeline, sequence and expert parallelism.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from resume_case import FEATURES, check_resumes
from run_case import run_until, tiny_recipe, write_inputs

TIMEOUT_S = 500.0  # kernels compile
KERNEL_SIZES = ("precision=bf16", "model.hidden_size=256", "model.head_dim=64", "model.ffn_size=384")
MODELS = {
    name: (*KERNEL_SIZES, *keys, *(["model.moe.expert_ffn_size=64"] if name == "all" else []))
    for name, keys in FEATURES.items()
}
LAYOUTS = {
    "dp2": ("all", ()),
    "ep2": ("all", ("stages.ctx_32.layout.ep=2",)),
    "tp2": ("all", ("stages.ctx_32.layout.tp=2", "stages.ctx_32.layout.tp_sequence_parallel=true")),
    "pp2": ("hybrid", ("stages.ctx_32.layout.pp=2",)),
    "sp2": ("hybrid", ("stages.ctx_32.layout.sp=2",)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("features", MODELS)
def test_one_gpu(tmp_path, run_ranks, features):
    write_inputs(tmp_path)
    ranks = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)
    check_resumes(tmp_path, ranks, "one", MODELS[features], (1, 37, 71))


@pytest.mark.multigpu(2)
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus(tmp_path, run_ranks, name):
    features, layout = LAYOUTS[name]
    write_inputs(tmp_path)
    ranks = run_ranks(2, backend="nccl", timeout_s=TIMEOUT_S)
    check_resumes(tmp_path, ranks, name, (*MODELS[features], *layout), (1, 37, 71))


def _warned(rank: int, recipe) -> list[str]:
    """What torch said while a run was under way."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_until(rank, recipe)
    finally:
        torch.set_warn_always(False)
    return sorted({str(warning.message).split(". ")[0] for warning in caught})


@pytest.mark.gpu
@pytest.mark.parametrize("features", MODELS)
def test_torch_has_a_deterministic_kernel_for_all_that_a_run_does(tmp_path, run_ranks, features):
    """Where it has none it goes on with another one, and says so: no such line may come."""
    write_inputs(tmp_path)
    recipe = tiny_recipe(tmp_path, "warned", *MODELS[features], "~stages.ctx_64", "~stages.ctx_128")
    (lines,) = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)(_warned, recipe)
    assert [line for line in lines if "deterministic" in line.lower()] == []
