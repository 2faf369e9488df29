"""Runs whose stages hold several chunks of layers: they resume bitwise, and go on from and to other splits."""

from __future__ import annotations

import pytest

from run_case import curve, run_until, tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit

CHUNKS = (
    "model.num_layers=6",
    "stages.ctx_64.layout.vpp=2",
    "stages.ctx_64.layout.pp_layers=[1,2,1,2]",
    "~stages.ctx_128",
)
PLAIN = ("model.num_layers=6", "~stages.ctx_128")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_ranks):
    """The uninterrupted run on two ranks."""
    root = tmp_path_factory.mktemp("chunks")
    write_inputs(root)
    assert run_ranks(2)(run_until, tiny_recipe(root, "whole", *CHUNKS)) == [Exit.DONE] * 2
    return root, curve(root / "whole")


def test_chunks_train_as_the_plain_pipeline_does(whole, run_ranks):
    root, records = whole
    assert run_ranks(2)(run_until, tiny_recipe(root, "plain", *PLAIN)) == [Exit.DONE] * 2
    for mine, theirs in zip(curve(root / "plain"), records, strict=True):
        assert mine[3] == pytest.approx(theirs[3], rel=1e-4)


def test_resume_is_bitwise_on_the_same_chunks(whole, run_ranks):
    root, records = whole
    assert run_ranks(2)(run_until, tiny_recipe(root, "stopped", *CHUNKS), 8) == [Exit.REQUEUE] * 2
    assert run_ranks(2)(run_until, tiny_recipe(root, "stopped", *CHUNKS)) == [Exit.DONE] * 2
    assert curve(root / "stopped") == records


@pytest.mark.parametrize("first, then", [(CHUNKS, PLAIN), (PLAIN, CHUNKS)], ids=["to_plain", "to_chunks"])
def test_a_checkpoint_of_one_split_continues_on_another(whole, run_ranks, first, then):
    root, records = whole
    name = f"moved_{first is CHUNKS}"
    assert run_ranks(2)(run_until, tiny_recipe(root, name, *first), 8) == [Exit.REQUEUE] * 2
    assert run_ranks(2)(run_until, tiny_recipe(root, name, *then)) == [Exit.DONE] * 2
    moved = curve(root / name)
    assert moved[8][3] == pytest.approx(records[8][3], rel=1e-5)
    for mine, theirs in zip(moved, records, strict=True):
        assert mine[3] == pytest.approx(theirs[3], rel=1e-4)


def test_one_rank_continues_what_chunks_began_and_back(whole, run_ranks):
    root, records = whole
    alone = (*PLAIN, "stages.ctx_64.layout.pp=1")
    assert run_ranks(2)(run_until, tiny_recipe(root, "shrunk", *CHUNKS), 7) == [Exit.REQUEUE] * 2
    assert run_ranks(1)(run_until, tiny_recipe(root, "shrunk", *alone), 8) == [Exit.REQUEUE]
    assert run_ranks(2)(run_until, tiny_recipe(root, "shrunk", *CHUNKS)) == [Exit.DONE] * 2
    for mine, theirs in zip(curve(root / "shrunk"), records, strict=True):
        assert mine[3] == pytest.approx(theirs[3], rel=1e-4)
