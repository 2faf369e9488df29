"""Expert parallelism: n ranks equal 1 rank, with packed documents of odd lengths and any load."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layout_case import check_equal, one_step, packed_rows, small_model
from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from sbtrain.config.model_schema import MoEConfig, RouterScore

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
