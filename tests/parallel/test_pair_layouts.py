"""Pairs and meta tokens: n ranks equal 1 rank, with every algorithm, and under recomputation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layout_case import check_equal, one_step, packed_rows, small_model
from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from sbtrain.config.model_schema import (
    FeatureMap,
    Gate,
    GLAConfig,
    MergePlace,
    MetaConfig,
    MetaPositions,
    PairConfig,
)
from sbtrain.config.schema import Recompute

HEADS = SequenceAlgorithms(*[SequenceAlgorithm.ulysses] * 3)
STATES = SequenceAlgorithms(S=SequenceAlgorithm.halo, L=SequenceAlgorithm.lasp2)
SCAN = SequenceAlgorithms(S=SequenceAlgorithm.halo, L=SequenceAlgorithm.zeco)
TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
META = MetaConfig(num_tokens=6)
SHARED = PairConfig(shared_projections=True)
PAIRS = dict(pattern="(LS)(LF)", gla=TIED)
MODELS = {
    "pairs": PAIRS,
    "pairs_meta": dict(**PAIRS, meta=META),
    "shared": dict(**PAIRS, pair=SHARED),
    "shared_meta": dict(**PAIRS, pair=SHARED, meta=META, qk_norm=True),
    "switched": dict(
        pattern="(LS)(LF)",
        gla=replace(TIED, rope=True),
        pair=PairConfig(norm_place=MergePlace.before_projection),
        meta=META,
    ),
    "plain_meta": dict(meta=META),
    "plain_meta_unrotated": dict(meta=replace(META, positions=MetaPositions.unrotated)),
    "low_rank_meta": dict(pattern="(LS)", meta=replace(META, in_state=False), pair=SHARED),
}
LAYOUTS = {
    "tp2": (2, Layout(tp=2)),
    "tp2_seq": (2, Layout(tp=2, tp_sequence_parallel=True)),
    "pp2": (2, Layout(pp=2)),
    "dp2": (2, Layout()),
    "sp2": (2, Layout(sp=2, sp_algorithm=HEADS)),
    "sp2_states": (2, Layout(sp=2, sp_algorithm=STATES)),
    "sp2_zeco": (2, Layout(sp=2, sp_algorithm=SCAN)),
    "sp4": (4, Layout(sp=4, sp_algorithm=HEADS)),
    "sp4_states": (4, Layout(sp=4, sp_algorithm=STATES)),
    "sp4_zeco": (4, Layout(sp=4, sp_algorithm=SCAN)),
    "pp2_sp2_states": (4, Layout(pp=2, sp=2, sp_algorithm=STATES)),
    "tp2_seq_sp2_states": (4, Layout(tp=2, sp=2, tp_sequence_parallel=True, sp_algorithm=STATES)),
    "tp2_seq_pp2": (4, Layout(tp=2, pp=2, tp_sequence_parallel=True)),
    "pp2_sp2_auto": (4, Layout(pp=2, sp=2)),
}
CASES = [
    *[("pairs_meta", name) for name in LAYOUTS],
    *[("shared_meta", name) for name in ("tp2", "tp2_seq", "sp2_states", "pp2_sp2_states", "tp2_seq_sp2_states")],
    *[("pairs", name) for name in ("tp2_seq", "sp2_zeco", "sp2", "pp2")],
    *[("shared", name) for name in ("tp2", "tp2_seq", "sp2_states")],
    *[("plain_meta", name) for name in ("tp2_seq_pp2", "sp4_zeco")],
    ("plain_meta_unrotated", "sp2_states"),
    *[("switched", name) for name in ("tp2", "tp2_seq", "sp2_states")],
    ("low_rank_meta", "tp2_seq"),
    ("low_rank_meta", "sp2_zeco"),
]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_layout_equals_one_rank(model, name, run_ranks):
    num_ranks, layout = LAYOUTS[name]
    config, rows = small_model(**MODELS[model]), packed_rows(4, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), config, rows)
    check_equal(run_ranks(num_ranks)(one_step, layout, config, rows), whole)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
@pytest.mark.parametrize("name", ["tp2_seq", "sp2_states"])
def test_recompute_changes_nothing(recompute, name, run_ranks):
    num_ranks, layout = LAYOUTS[name]
    config, rows = small_model(**MODELS["pairs_meta"]), packed_rows(2, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), config, rows)
    check_equal(run_ranks(num_ranks)(one_step, layout, config, rows, recompute), whole)


def test_odd_heads_and_shards_shorter_than_the_window(run_ranks):
    """9/3 heads over 4 ranks, more meta tokens than a shard has tokens."""
    config = small_model(**PAIRS, num_heads=9, num_kv_heads=3, meta=replace(META, num_tokens=11), tie_embeddings=True)
    rows = packed_rows(2, 24, 120, seed=3)
    changes = replace(config, pattern="(LS)")
    (whole,) = run_ranks(1)(one_step, Layout(), changes, rows)
    check_equal(run_ranks(4)(one_step, Layout(sp=4, sp_algorithm=STATES), changes, rows), whole)
