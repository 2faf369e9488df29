"""n ranks equal 1 rank: loss, gradients and the loss after a step, with packed documents of odd lengths."""

from __future__ import annotations

import pytest

from layout_case import check_equal, one_step, packed_rows, small_model
from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from sbtrain.config.schema import Recompute

HEADS = SequenceAlgorithms(*[SequenceAlgorithm.ulysses] * 3)
STATES = SequenceAlgorithms(S=SequenceAlgorithm.halo, L=SequenceAlgorithm.lasp2)
SCAN = SequenceAlgorithms(S=SequenceAlgorithm.halo, L=SequenceAlgorithm.zeco)
LAYOUTS = {
    "tp2": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "sp2": (2, Layout(sp=2, sp_algorithm=HEADS)),
    "dp2": (2, Layout()),
    "tp2_seq": (2, Layout(tp=2, tp_sequence_parallel=True)),
    "tp2_sp2": (4, Layout(tp=2, sp=2, sp_algorithm=HEADS)),
    "tp2_seq_sp2": (4, Layout(tp=2, sp=2, tp_sequence_parallel=True, sp_algorithm=HEADS)),
    "pp2_sp2": (4, Layout(pp=2, sp=2, sp_algorithm=HEADS)),
    "tp2_pp2": (4, Layout(tp=2, pp=2)),
    "dp2_tp2": (4, Layout(tp=2)),
    "sp4": (4, Layout(sp=4, sp_algorithm=HEADS)),
    "pp4": (4, Layout(pp=4)),
    "sp2_states": (2, Layout(sp=2, sp_algorithm=STATES)),
    "sp4_states": (4, Layout(sp=4, sp_algorithm=STATES)),
    "tp2_seq_sp2_states": (4, Layout(tp=2, sp=2, tp_sequence_parallel=True, sp_algorithm=STATES)),
    "pp2_sp2_states": (4, Layout(pp=2, sp=2, sp_algorithm=STATES)),
    "sp2_zeco": (2, Layout(sp=2, sp_algorithm=SCAN)),
    "sp4_zeco": (4, Layout(sp=4, sp_algorithm=SCAN)),
    "tp2_sp2_zeco": (4, Layout(tp=2, sp=2, sp_algorithm=SCAN)),
    "pp2_sp2_zeco": (4, Layout(pp=2, sp=2, sp_algorithm=SCAN)),
    "pp2_sp2_auto": (4, Layout(pp=2, sp=2)),
    "sp8": (8, Layout(sp=8, sp_algorithm=HEADS)),
    "sp8_zeco": (8, Layout(sp=8, sp_algorithm=SCAN)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name, run_ranks):
    num_ranks, layout = LAYOUTS[name]
    model, rows = small_model(), packed_rows(4, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(num_ranks)(one_step, layout, model, rows), whole)


@pytest.mark.parametrize("name", ["pp2", "sp2", "tp3"])
def test_odd_heads_and_tied_embeddings(name, run_ranks):
    model = small_model(
        num_heads=9, num_kv_heads=3, tie_embeddings=True, qkv_bias=False, qk_norm=True, vocab_multiple=24
    )
    rows = packed_rows(2, 42, 120)
    num_ranks, layout = (3, Layout(tp=3)) if name == "tp3" else LAYOUTS[name]
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(num_ranks)(one_step, layout, model, rows), whole)


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
def test_states_and_halos_go_with_any_number_of_heads(recompute, run_ranks):
    """9/3 heads over 4 ranks, which ulysses would refuse; shards of 6 tokens, shorter than the window of 7."""
    model = small_model(pattern="LSSL", num_heads=9, num_kv_heads=3, qk_norm=True)
    rows = packed_rows(2, 24, 120, seed=3)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(4)(one_step, Layout(sp=4, sp_algorithm=STATES), model, rows, recompute), whole)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recompute_changes_nothing(recompute, run_ranks):
    model, rows = small_model(), packed_rows(2, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(2)(one_step, Layout(tp=2, tp_sequence_parallel=True), model, rows, recompute), whole)
