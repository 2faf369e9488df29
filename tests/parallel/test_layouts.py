"""n ranks equal 1 rank: loss, gradients and the loss after a step, with packed documents of odd lengths."""

from __future__ import annotations

import pytest

from layout_case import carried, check_equal, one_step, packed_rows, rows_of, small_model
from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from sbtrain.config.model_schema import Gate, GLAConfig
from sbtrain.config.schema import Recompute
from sequence_case import layouts

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
    "sp8_states": (8, Layout(sp=8, sp_algorithm=STATES)),
    "sp8_zeco": (8, Layout(sp=8, sp_algorithm=SCAN)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name, run_ranks):
    num_ranks, layout = LAYOUTS[name]
    model, rows = small_model(), packed_rows(4, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(num_ranks)(one_step, layout, model, rows), whole)


THREES = {
    "tp3": Layout(tp=3),
    "sp3": Layout(sp=3, sp_algorithm=HEADS),
    "sp3_states": Layout(sp=3, sp_algorithm=STATES),
    "sp3_zeco": Layout(sp=3, sp_algorithm=SCAN),
}


@pytest.mark.parametrize("name", ["pp2", "sp2", *THREES])
def test_odd_heads_and_tied_embeddings(name, run_ranks):
    model = small_model(
        num_heads=9, num_kv_heads=3, tie_embeddings=True, qkv_bias=False, qk_norm=True, vocab_multiple=24
    )
    rows = packed_rows(2, 42, 120)
    num_ranks, layout = (3, THREES[name]) if name in THREES else LAYOUTS[name]
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(num_ranks)(one_step, layout, model, rows), whole)


@pytest.mark.parametrize("name", [name for name, (_, layout) in LAYOUTS.items() if layout.sp == 2])
def test_documents_cut_anywhere_in_whole_models(name, run_ranks):
    """At, beside and between the shards' boundary, empty, of one token and over both shards; with tp and pp too."""
    num_ranks, layout = LAYOUTS[name]
    model, rows = small_model(), rows_of(layouts(2, shard_tokens=12, num_random=6, seed=num_ranks), 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(num_ranks)(one_step, layout, model, rows), whole)


@pytest.mark.parametrize("name", ["sp2_states", "sp4_states", "tp2_seq_sp2_states", "sp2_zeco", "tp2_sp2_zeco"])
def test_a_step_carries_the_formulas_times_rows_and_layers(name, run_ranks):
    """2 layers L and one S, 2 rows of one document: nothing else travels between the shards."""
    num_ranks, layout = LAYOUTS[name]
    model, rows = small_model(pattern="LSL", num_layers=3), rows_of([[0, 48]] * 2, 120)
    heads, size = model.num_kv_heads // layout.tp, model.head_dim
    halo = (model.window - 1) * heads * 2 * size
    for rank, calls in enumerate(run_ranks(num_ranks)(carried, layout, model, rows)):
        shard, last = rank // layout.tp % layout.sp, layout.sp - 1
        halos = [(shard > 0) * halo, (shard < last) * halo]  # received forward, and the gradients of those sent
        expected = [("all_to_all", elements) for elements in halos] * 2
        if layout.sp_algorithm is STATES:
            expected += [("all_gather", last * heads * (size * size + size))] * 8
        else:
            expected += [("sent", heads * size * size)] * 4 * ((shard < last) + (shard > 0))
        assert sorted(calls) == sorted(expected), rank


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
def test_states_and_halos_go_with_any_number_of_heads(recompute, run_ranks):
    """9/3 heads over 4 ranks, which ulysses would refuse; shards of 6 tokens, shorter than the window of 7."""
    model = small_model(pattern="LSSL", num_heads=9, num_kv_heads=3, qk_norm=True)
    rows = packed_rows(2, 24, 120, seed=3)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(4)(one_step, Layout(sp=4, sp_algorithm=STATES), model, rows, recompute), whole)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recompute_changes_nothing(recompute, run_ranks):
    model, rows = small_model(gla=GLAConfig(gate=Gate.full_rank)), packed_rows(2, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(2)(one_step, Layout(tp=2, tp_sequence_parallel=True), model, rows, recompute), whole)
