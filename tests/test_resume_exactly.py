"""A hundred steps with interruptions at odd steps are a hundred steps without, bit by bit: see resume_case."""

from __future__ import annotations

import pytest

from resume_case import FEATURES, check_resumes
from run_case import write_inputs

LAYOUTS = {
    "dp2": ("all", 2, ()),
    "ep2": ("all", 2, ("stages.ctx_32.layout.ep=2", "stages.ctx_32.experts={max_copies: 2, copy_above: 1.2, "
            "release_below: 0.8}")),
    "tp2": ("all", 2, ("stages.ctx_32.layout.tp=2", "stages.ctx_32.layout.tp_sequence_parallel=true")),
    "pp2": ("all", 2, ("stages.ctx_32.layout.pp=2",)),
    "sp2": ("all", 2, ("stages.ctx_32.layout.sp=2",)),
    "tp2_pp2": ("hybrid", 4, ("stages.ctx_32.layout.tp=2", "stages.ctx_32.layout.pp=2")),
}  # fmt: skip


@pytest.mark.parametrize("features", [pytest.param(name, marks=[] if name == "all" else pytest.mark.slow)
                                      for name in FEATURES])  # fmt: skip
def test_one_rank(tmp_path, run_ranks, features):
    write_inputs(tmp_path)
    check_resumes(tmp_path, run_ranks(1, timeout_s=400.0), "one", FEATURES[features], (1, 37, 71))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_several_ranks(tmp_path, run_ranks, name):
    features, num_ranks, layout = LAYOUTS[name]
    write_inputs(tmp_path)
    ranks = run_ranks(num_ranks, timeout_s=600.0)
    check_resumes(tmp_path, ranks, name, (*FEATURES[features], *layout), (1, 37, 71))
