"""A step whose loss or gradient is not finite changes nothing, on any layout, and a resumed run goes on exactly."""

from __future__ import annotations

import json

import pytest

from run_case import curve, tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit
from skip_case import records, run_breaking, skipped_steps

BROKEN = {3: [1], 8: [0], 12: [0]}
"""One step of each stage: the second data-parallel rank's row, a pipeline's first row, the only row of two shards."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_ranks):
    """The uninterrupted run with three broken steps, on two ranks."""
    root = tmp_path_factory.mktemp("skips")
    write_inputs(root)
    assert run_ranks(2)(run_breaking, tiny_recipe(root, "whole"), BROKEN) == [Exit.DONE] * 2
    return root, curve(root / "whole")


def test_the_run_goes_on_and_says_which_samples_it_skipped(whole):
    root, steps = whole
    assert [step[0] for step in steps] == list(range(1, 15))
    found = records(root / "whole")
    assert [record["step"] for record in found if record.get("skipped")] == [3, 8, 12]
    assert [record["skipped_steps"] for record in found] == [0] * 2 + [1] * 5 + [2] * 4 + [3] * 3
    assert [record["loss"] is None for record in found] == [record.get("skipped", False) for record in found]
    third, eighth, twelfth = skipped_steps(root / "whole")
    assert (third["step"], third["stage"], third["loss"], third["grad_norm"]) == (3, "ctx_32", "nan", "nan")
    assert (third["first_sample"], third["num_samples"]) == (8, 4)
    assert [suspect["sample"] for suspect in third["suspects"]] == [10, 11]
    assert all(suspect["source"] in ("one", "two") and suspect["documents"] for suspect in third["suspects"])
    assert [suspect["sample"] for suspect in eighth["suspects"]] == [2]
    assert (twelfth["stage"], twelfth["first_sample"], twelfth["num_samples"]) == ("ctx_128", 1, 1)
    assert (root / "whole/report/index.html").exists()


@pytest.mark.parametrize("stop", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_resume_behind_a_skipped_step_is_bitwise(whole, run_ranks, stop):
    root, steps = whole
    recipe = tiny_recipe(root, f"stop_{stop}")
    assert run_ranks(2)(run_breaking, recipe, BROKEN, stop) == [Exit.REQUEUE] * 2
    assert run_ranks(2)(run_breaking, recipe, BROKEN) == [Exit.DONE] * 2
    assert curve(root / f"stop_{stop}") == steps
    keys = ("loss_score", "skipped", "skipped_steps")
    theirs, ours = ([[r.get(k) for k in keys] for r in records(root / name)] for name in ("whole", f"stop_{stop}"))
    assert ours == theirs
    assert skipped_steps(root / f"stop_{stop}") == skipped_steps(root / "whole")


def test_an_infinite_loss_with_finite_gradients_is_skipped_too(whole, run_ranks):
    """Only one rank's row is infinite; every layout learns of it from the gradient norm."""
    root, steps = whole
    assert run_ranks(2)(run_breaking, tiny_recipe(root, "inf"), BROKEN, kind="inf") == [Exit.DONE] * 2
    sound = [step for step in curve(root / "inf") if step[0] not in BROKEN]
    assert sound == [step for step in steps if step[0] not in BROKEN]
    assert [entry["loss"] for entry in skipped_steps(root / "inf")] == ["inf"] * 3


def test_other_layouts_skip_the_same_steps(whole, run_ranks):
    root, steps = whole
    other = (
        *("stages.ctx_32.layout.tp=2", "stages.ctx_64.layout.pp=1", "stages.ctx_64.layout.sp=2"),
        *("stages.ctx_128.layout.sp=1", "stages.ctx_128.layout.tp=2"),
    )
    assert run_ranks(2)(run_breaking, tiny_recipe(root, "other", *other), BROKEN) == [Exit.DONE] * 2
    for mine, theirs in zip(curve(root / "other"), steps, strict=True):
        assert mine[:3] == theirs[:3] and (mine[3] is None) == (theirs[3] is None)
        assert theirs[3] is None or mine[3] == pytest.approx(theirs[3], rel=1e-4)
    ours, theirs = skipped_steps(root / "other"), skipped_steps(root / "whole")
    assert ours == theirs


def test_too_many_skipped_steps_stop_the_run_on_all_ranks(whole, run_ranks):
    root, _ = whole
    recipe = tiny_recipe(root, "stops", "watch.max_skipped_steps=1")
    with pytest.raises(Exception, match=r"step 5 of stage ctx_32: loss nan.*watch\.max_skipped_steps=1.*skipped_steps"):
        run_ranks(2)(run_breaking, recipe, {4: [0], 5: [1]})
    assert [(entry["step"], entry["first_sample"]) for entry in skipped_steps(root / "stops")] == [(4, 12), (5, 16)]
    assert json.loads((root / "stops/ledger.json").read_text())["step"] == 3
    assert run_ranks(2)(run_breaking, tiny_recipe(root, "stops"), {4: [0]}) == [Exit.DONE] * 2
    assert [entry["step"] for entry in skipped_steps(root / "stops")] == [4]
