"""Expert parallelism: n ranks equal 1 rank, with packed documents of odd lengths and any load."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layout_case import check_equal, one_step, overlapped_step, packed_rows, small_model
from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from sbtrain.config.model_schema import MoEConfig, RouterScore
from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.config.schema import Recompute

HEADS = SequenceAlgorithms(*[SequenceAlgorithm.ulysses] * 3)
TOP1 = MoEConfig(num_experts=8, expert_ffn_size=24, aux_loss_coeff=0.1, z_loss_coeff=0.01)
TOP2 = replace(TOP1, top_k=2, num_shared_experts=2, score=RouterScore.sigmoid, renormalize=True, bias_update_rate=0.01)
LAYOUTS = {
    "dp2": (2, Layout()),
    "tp2": (2, Layout(tp=2)),
    "ep2": (2, Layout(ep=2)),
    "ep4": (4, Layout(ep=4)),
    "ep2_dp2": (4, Layout(ep=2)),
    "ep2_pp2": (4, Layout(ep=2, pp=2)),
    "ep2_tp2": (2, Layout(ep=2, tp=2)),
    "ep4_tp2": (4, Layout(ep=4, tp=2)),
    "ep2_tp2_dp2": (4, Layout(ep=2, tp=2)),
    "ep2_tp2_seq": (4, Layout(ep=2, tp=2, tp_sequence_parallel=True)),
    "ep2_sp2": (2, Layout(ep=2, sp=2, sp_algorithm=HEADS)),
    "ep4_sp2": (4, Layout(ep=4, sp=2, sp_algorithm=HEADS)),
}


def mixture(moe: MoEConfig = TOP1, **changes):
    """4 layers, two of them mixtures; both on one stage of pp2."""
    return small_model(pattern="L S F:m L:m", moe=moe, **changes)


@pytest.mark.parametrize("moe", [TOP1, TOP2], ids=["top1", "top2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name, moe, run_ranks):
    num_ranks, layout = LAYOUTS[name]
    model, rows = mixture(moe), packed_rows(4, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows, num_steps=2)
    results = run_ranks(num_ranks)(one_step, layout, model, rows, num_steps=2)
    check_equal(results, whole)
    for result in results:
        for theirs, ours in zip(result["metrics"], whole["metrics"], strict=True):
            assert theirs["experts"]["load"] == ours["experts"]["load"]
            assert theirs["experts"]["aux_loss"] == pytest.approx(ours["experts"]["aux_loss"], rel=1e-5)


@pytest.mark.parametrize("recompute", [Recompute.activations, Recompute.selective, Recompute.full])
def test_recompute_changes_nothing(recompute, run_ranks):
    model, rows = mixture(TOP2), packed_rows(4, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    results = run_ranks(4)(one_step, Layout(ep=2, pp=2), model, rows, recompute)
    check_equal(results, whole)
    assert results[0]["metrics"][0]["experts"]["load"] == whole["metrics"][0]["experts"]["load"]


SKEWED = [0.02, 0.5, 0.02, 0.3, 0.04, 0.04, 0.04, 0.04]


@pytest.mark.parametrize("name", ["ep2", "ep2_tp2", "ep2_dp2"])
def test_copies_of_hot_experts_come_and_change_nothing(name, run_ranks):
    """The first step sees the load, the others have the copies. With ep2_dp2 also while gradients are reduced."""
    (num_ranks, layout), step = LAYOUTS[name], overlapped_step if name == "ep2_dp2" else one_step
    model, rows, options = mixture(), packed_rows(4, 48, 120), ExpertsConfig(max_copies=2, copy_above=2.0)
    for num_steps, rel in ((1, 2e-6), (3, 1e-4)):  # the first copies meet equal weights
        plain = run_ranks(num_ranks)(one_step, layout, model, rows, num_steps=num_steps, forced=SKEWED)
        copied = run_ranks(num_ranks)(step, layout, model, rows, num_steps=num_steps, forced=SKEWED, experts=options)
        for one, two in zip(copied, plain):
            assert [metrics["experts"]["copies"] for metrics in one["metrics"]] == [0, 4, 4][:num_steps]
            assert one["after"] == pytest.approx(two["after"], rel=1e-5)
            for name, grad in one["last_grads"].items():
                expected = two["last_grads"][name]
                assert float((grad - expected).norm()) <= rel * max(float(expected.norm()), 1e-2), name


def test_one_hot_expert_and_idle_ones(run_ranks):
    """All rows of one expert, nothing for a rank: forward, backward, norm, step."""
    model, rows, forced = mixture(), packed_rows(4, 48, 120), [0.0] * 7 + [1.0]
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows, forced=forced)
    results = run_ranks(2)(one_step, Layout(ep=2), model, rows, forced=forced)
    check_equal(results, whole)
    assert results[0]["metrics"][0]["experts"]["load_max"] == 8.0
    assert results[0]["metrics"][0]["experts"]["load_min"] == 0.0
