"""Spiking models on GPUs: their steps are as near to fp32 as plain torch's in bf16, on one GPU and under tp on two.

A count next to a half may differ by one wherever sums are taken in another order, so nothing is compared bit by bit.
"""

from __future__ import annotations

import pytest

from layout_case import one_step, packed_rows, small_model
from parallel.layout import Layout
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MoEConfig
from sbtrain.config.schema import Precision, Recompute
from sbtrain.config.spiking_schema import SpikingConfig
from test_layouts_on_gpus import TIMEOUT_S, check_near, distance, kernel_model

ALL = SpikingConfig(enabled=True, spike_down_proj=True)
MODELS = {
    "plain": {},
    "pairs": dict(pattern="(LS)(LF)", gla=GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)),
    "experts": dict(pattern="L S F:m L:m", moe=MoEConfig(num_experts=4, expert_ffn_size=128, aux_loss_coeff=0.0)),
}


def steps_near_fp32(run_ranks, model, layout: Layout, num_ranks: int) -> None:
    rows, cpu = packed_rows(2, 500, 120), run_ranks(1, timeout_s=TIMEOUT_S)
    (whole,) = cpu(one_step, Layout(), model, rows)
    (reference,) = cpu(one_step, Layout(), model, rows, precision=Precision.bf16)
    gpus = run_ranks(num_ranks, backend="nccl", timeout_s=TIMEOUT_S)
    for result in gpus(one_step, layout, model, rows, precision=Precision.bf16):
        check_near(result, whole, allowed=distance(reference, whole))
        sparsity = whole["metrics"][0]["spike_sparsity"]
        assert result["metrics"][0]["spike_sparsity"] == pytest.approx(sparsity, abs=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_one_gpu(run_ranks, name):
    steps_near_fp32(run_ranks, kernel_model(**MODELS[name], spiking=ALL), Layout(), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [Recompute.activations, Recompute.selective, Recompute.full])
def test_recompute_changes_nothing(run_ranks, recompute):
    """The same kernels on the same numbers: not one count differs."""
    model, rows = small_model(hidden_size=256, head_dim=64, spiking=ALL), packed_rows(2, 96, 120)
    gpu = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)
    (whole,) = gpu(one_step, Layout(), model, rows)
    (again,) = gpu(one_step, Layout(), model, rows, recompute)
    assert again["loss"] == whole["loss"] and again["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, tp_sequence_parallel=True)], ids=["tp2", "tp2_seq"])
def test_two_gpus(run_ranks, layout):
    steps_near_fp32(run_ranks, kernel_model(spiking=ALL), layout, 2)
