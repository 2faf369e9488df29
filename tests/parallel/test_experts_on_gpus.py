"""Mixtures of experts on GPUs: the kernels and NCCL give what the CPU gives, without a wait in the way."""

from __future__ import annotations

import pytest
import torch

from layout_case import one_step, packed_rows
from parallel.layout import Layout
from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.config.schema import Precision, Recompute
from test_expert_layouts import SKEWED, TOP2, mixture
from test_layouts import check_equal

TIMEOUT_S = 400.0
LAYOUTS = {
    "ep2": (2, Layout(ep=2)),
    "ep2_pp2": (4, Layout(ep=2, pp=2)),
    "ep2_tp2": (4, Layout(ep=2, tp=2, tp_sequence_parallel=True)),
    "ep2_sp2": (4, Layout(ep=2, sp=2)),
    "ep4": (4, Layout(ep=4)),
}


@pytest.mark.gpu
def test_one_gpu_equals_cpu(run_ranks):
    rows = packed_rows(2, 48, 120)
    (cpu,) = run_ranks(1)(one_step, Layout(), mixture(TOP2), rows)
    check_equal(run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)(one_step, Layout(), mixture(TOP2), rows), cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", list(Recompute))
def test_bf16_on_one_gpu_is_close_and_repeats(recompute, run_ranks):
    """The choices are forced, so that rounding flips none. Twice the same bits: no float atomics."""
    rows, options = packed_rows(2, 48, 120), dict(forced=SKEWED, precision=Precision.bf16)
    gpu = run_ranks(1, backend="nccl", timeout_s=TIMEOUT_S)
    (cpu,) = run_ranks(1)(one_step, Layout(), mixture(TOP2), rows, forced=SKEWED)
    (first,) = gpu(one_step, Layout(), mixture(TOP2), rows, recompute, **options)
    (again,) = gpu(one_step, Layout(), mixture(TOP2), rows, recompute, **options)
    assert first["loss"] == pytest.approx(cpu["loss"], rel=2e-2)
    for name, grad in first["grads"].items():
        assert torch.equal(grad, again["grads"][name]), name


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.multigpu(LAYOUTS[name][0])) for name in LAYOUTS])
def test_layout_equals_one_rank(name, run_ranks):
    num_ranks, layout = LAYOUTS[name]
    rows = packed_rows(4, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), mixture(TOP2), rows)
    results = run_ranks(num_ranks, backend="nccl", timeout_s=TIMEOUT_S)(one_step, layout, mixture(TOP2), rows)
    check_equal(results, whole)


@pytest.mark.multigpu(2)
def test_copies_of_hot_experts_change_nothing(run_ranks):
    rows, options = packed_rows(4, 48, 120), ExpertsConfig(max_copies=2, copy_above=2.0)
    gpu = run_ranks(2, backend="nccl", timeout_s=TIMEOUT_S)
    plain = gpu(one_step, Layout(ep=2), mixture(), rows, num_steps=3, forced=SKEWED)
    copied = gpu(one_step, Layout(ep=2), mixture(), rows, num_steps=3, forced=SKEWED, experts=options)
    for one, two in zip(copied, plain):
        assert one["metrics"][-1]["experts"]["copies"] == 4
        assert one["after"] == pytest.approx(two["after"], rel=1e-5)
