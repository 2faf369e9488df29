"""Stages of several chunks (layout.vpp) equal one rank: loss, gradients and the loss after a step."""

from __future__ import annotations

import pytest

from layout_case import one_step, packed_rows, small_model
from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from sbtrain.config.schema import Recompute
from test_layouts import HEADS, check_equal

EIGHT = dict(pattern="LSFLLSSF", num_layers=8)
LAYOUTS = {
    "pp2_vpp2": (2, Layout(pp=2, vpp=2)),
    "pp2_vpp4": (2, Layout(pp=2, vpp=4)),
    "uneven": (2, Layout(pp=2, vpp=3, pp_layers=(2, 1, 1, 2, 1, 1))),
    "dp2": (4, Layout(pp=2, vpp=2)),
    "sp2": (4, Layout(pp=2, vpp=2, sp=2, sp_algorithm=HEADS)),
    "tp2": (4, Layout(pp=2, vpp=2, tp=2, tp_sequence_parallel=True)),
    "pp3_vpp2": (3, Layout(pp=3, vpp=2)),
    "pp4_vpp2": (4, Layout(pp=4, vpp=2)),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_interleaved_chunks_equal_one_rank(name, tied, run_ranks):
    num_ranks, layout = LAYOUTS[name]
    model = small_model(tie_embeddings=tied, **EIGHT)
    rows = packed_rows(12, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    check_equal(run_ranks(num_ranks)(one_step, layout, model, rows), whole)
