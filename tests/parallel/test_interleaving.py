"""Stages of several chunks (layout.vpp) equal one rank: loss, gradients and the loss after a step."""

from __future__ import annotations

import time

import pytest

from layout_case import build_engine, check_equal, one_step, overlapped_step, packed_rows, small_model
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.schedule import evaluate_rows
from sbtrain.config.schema import Recompute
from test_expert_layouts import TOP2
from test_layouts import HEADS
from test_pair_layouts import META, TIED

CASES = {
    "pp2_vpp2": (2, Layout(pp=2, vpp=2)),
    "pp2_vpp2_tied": (2, Layout(pp=2, vpp=2)),
    "pp2_vpp4": (2, Layout(pp=2, vpp=4)),
    "uneven_tied": (2, Layout(pp=2, vpp=3, pp_layers=(2, 1, 1, 2, 1, 1))),
    "dp2_tied": (4, Layout(pp=2, vpp=2)),
    "sp2": (4, Layout(pp=2, vpp=2, sp=2, sp_algorithm=HEADS)),
    "tp2_tied": (4, Layout(pp=2, vpp=2, tp=2, tp_sequence_parallel=True)),
    "pp3_vpp2": (3, Layout(pp=3, vpp=2)),
    "pp4_vpp2": (4, Layout(pp=4, vpp=2)),
    "uneven_stages": (2, Layout(pp=2, pp_layers=(6, 2))),
}


MIXED = {
    "pp2_vpp2": (2, Layout(pp=2, vpp=2)),
    "ep2": (4, Layout(pp=2, vpp=2, ep=2)),
    "ep2_tp2": (4, Layout(pp=2, vpp=2, ep=2, tp=2, tp_sequence_parallel=True)),
    "sp2": (4, Layout(pp=2, vpp=2, sp=2, sp_algorithm=HEADS)),
}


def eight_layers(**changes):
    return small_model(**{**dict(pattern="LSFLLSSF", num_layers=8), **changes})


@pytest.fixture(scope="module")
def whole(run_ranks):
    """The step on one rank, tied and not."""
    return {
        tied: run_ranks(1)(one_step, Layout(), eight_layers(tie_embeddings=tied), packed_rows(12, 48, 120))[0]
        for tied in (False, True)
    }


@pytest.mark.parametrize("name", CASES)
def test_chunks_equal_one_rank(name, whole, run_ranks):
    num_ranks, layout = CASES[name]
    tied = name.endswith("tied")
    model, rows = eight_layers(tie_embeddings=tied), packed_rows(12, 48, 120)
    check_equal(run_ranks(num_ranks)(one_step, layout, model, rows), whole[tied])


@pytest.mark.parametrize("name", MIXED)
def test_chunks_of_pairs_and_mixtures_behind_meta_tokens(name, run_ranks):
    """Gradients reduced while the backward pass runs."""
    num_ranks, layout = MIXED[name]
    model = small_model(pattern="(LS):m (LF) (LF):m (LS)", moe=TOP2, meta=META, gla=TIED, tie_embeddings=True)
    rows = packed_rows(4, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows, num_steps=2)
    results = run_ranks(num_ranks)(overlapped_step, layout, model, rows, num_steps=2)
    check_equal(results, whole)
    for result in results:
        for theirs, ours in zip(result["metrics"], whole["metrics"], strict=True):
            assert theirs["experts"]["load"] == ours["experts"]["load"]


def test_chunks_with_recomputed_layers(whole, run_ranks):
    case = (Layout(pp=2, vpp=2), eight_layers(), packed_rows(12, 48, 120), Recompute.full)
    check_equal(run_ranks(2)(one_step, *case), whole[False])


def late_step(rank: int, late_rank: int, *case):
    """one_step with a rank that takes its time in every forward pass."""
    from sbtrain.model.hybrid import HybridModel

    forward = HybridModel.forward

    def slow(*args):
        if rank == late_rank:
            time.sleep(0.05)
        return forward(*args)

    HybridModel.forward = slow
    try:
        return one_step(rank, *case)
    finally:
        HybridModel.forward = forward


@pytest.mark.parametrize("late_rank", [0, 1])
def test_nothing_is_freed_before_a_late_stage_has_received_it(late_rank, run_ranks):
    """Large enough that a send does not end before the receiver is there."""
    case = (small_model(pattern="L"), packed_rows(6, 4096, 120))
    (whole,) = run_ranks(1)(one_step, Layout(), *case)
    check_equal(run_ranks(2)(late_step, late_rank, Layout(pp=2, vpp=2), *case), whole)


def judged(rank: int, layout: Layout, model, rows) -> list:
    """Losses of some rows before and after a step."""
    with Mesh.build(layout) as mesh:
        engine = build_engine(model, mesh, seq_len=len(rows[0].tokens))
        before = evaluate_rows(engine.models, mesh, rows[:3])
        engine.forward_backward(rows[mesh.dp_rank :: mesh.dp])
        engine.step(lr=1e-2)
        after = evaluate_rows(engine.chunks, mesh, rows[:3])
        engine.close()
        return [(loss.loss, loss.num_tokens) for loss in (*before, *after)]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_rows_can_be_judged(num_ranks, run_ranks):
    """The schedule takes pp rows at a time; three are not two, on one or two data-parallel ranks."""
    model, rows = eight_layers(), packed_rows(4, 48, 120)
    (expected,) = run_ranks(1)(judged, Layout(), model, rows)
    for found in run_ranks(num_ranks)(judged, Layout(pp=2, vpp=2), model, rows):
        for (loss, count), (expected_loss, expected_count) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5) and count == expected_count
