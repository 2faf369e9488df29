"""Interrupted at any step and continued, a run through several stages is the uninterrupted one, bit by bit.

On another layout: test_resume_elsewhere. Over a hundred steps: test_resume_exactly.
"""

from __future__ import annotations

import json

import pytest

from run_case import curve, run_until, run_until_judging, tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit
from sbtrain.report.run_files import read_run
from sbtrain.report.tables import bits_rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_ranks):
    """The uninterrupted run on two ranks: its folder and what it recorded."""
    root = tmp_path_factory.mktemp("resume")
    write_inputs(root)
    assert run_ranks(2)(run_until, tiny_recipe(root, "whole")) == [Exit.DONE, Exit.DONE]
    return root, curve(root / "whole")


def test_run_learns_through_all_stages(whole):
    root, records = whole
    assert [record[2] for record in records] == ["ctx_32"] * 6 + ["ctx_64"] * 4 + ["ctx_128"] * 4
    assert records[-1][1] == 768 + 512 + 512
    assert records[5][3] < records[0][3] - 0.2
    names = [point["name"] for point in json.loads((root / "whole/evaluation.json").read_text())["points"]]
    assert names == ["start", "ctx_32", "ctx_64", "ctx_128"]
    assert sorted(folder.name for folder in (root / "whole/checkpoints").iterdir()) == ["step_12", "step_14"]


@pytest.mark.parametrize("stop", [1, 5, 6, 8, 13])
def test_resume_is_bitwise_on_the_same_layout(whole, run_ranks, stop):
    root, records = whole
    recipe = tiny_recipe(root, f"stop_{stop}")
    codes = run_ranks(2)(run_until, recipe, stop)
    assert codes == [Exit.REQUEUE] * 2
    assert len(curve(root / f"stop_{stop}")) == stop
    assert run_ranks(2)(run_until, recipe) == [Exit.DONE, Exit.DONE]
    assert curve(root / f"stop_{stop}") == records
    points = [json.loads((root / name / "evaluation.json").read_text()) for name in ("whole", f"stop_{stop}")]
    assert points[0] == points[1]


def starts_of(run_dir) -> list[tuple]:
    """(stage, step, sp, mixer -> algorithm with its reason) of every start in env.json."""
    starts = json.loads((run_dir / "env.json").read_text())["starts"]
    return [tuple(start[key] for key in ("stage", "step", "sp", "sp_algorithm")) for start in starts]


def test_the_run_keeps_what_carried_each_mixer_over_the_shards(whole, run_ranks):
    """What auto chose, from which step on, also where a later start has another choice."""
    root, _ = whole
    *alone, (stage, step, sp, found) = starts_of(root / "whole")
    assert alone == [("ctx_32", 0, 1, {}), ("ctx_64", 6, 1, {})] and (stage, step, sp) == ("ctx_128", 10, 2)
    assert found["F"] == "ulysses (the only one)" and found["S"].startswith("halo (receives 256 elements a layer")
    assert found["L"].startswith(("lasp2 (a state to 2 ranks: lasp2 ", "zeco (a state to 2 ranks: lasp2 "))

    assert run_ranks(2)(run_until, tiny_recipe(root, "chosen"), 12) == [Exit.REQUEUE] * 2
    before = starts_of(root / "chosen")
    named = tiny_recipe(root, "chosen", "stages.ctx_128.layout.sp_algorithm.L=ulysses")
    assert run_ranks(2)(run_until, named) == [Exit.DONE] * 2
    *kept, (stage, step, sp, found) = starts_of(root / "chosen")
    assert kept == before and (stage, step, sp) == ("ctx_128", 12, 2)
    assert found["L"] == "ulysses (the recipe's)" and found["S"].startswith("halo (receives ")


@pytest.mark.parametrize("name, step", [("start", None), ("ctx_64", 10)])
def test_a_signal_stops_an_evaluation(whole, run_ranks, name, step):
    """It can be long: the run stops between its rows, and does the whole evaluation when it goes on."""
    root, records = whole
    recipe = tiny_recipe(root, f"judging_{name}")
    assert run_ranks(2)(run_until_judging, recipe, name) == [Exit.REQUEUE] * 2
    path = root / recipe.run_dir / "evaluation.json"
    assert not path.exists() or f'"{name}"' not in path.read_text()
    assert not step or len(curve(root / recipe.run_dir)) == step
    assert run_ranks(2)(run_until, recipe) == [Exit.DONE, Exit.DONE]
    assert curve(root / recipe.run_dir) == records
    assert path.read_text() == (root / "whole/evaluation.json").read_text()


def test_other_evaluation_settings_add_points_and_lose_none(whole, run_ranks):
    root, _ = whole
    assert run_ranks(2)(run_until, tiny_recipe(root, "settings"), 8) == [Exit.REQUEUE] * 2
    assert run_ranks(2)(run_until, tiny_recipe(root, "settings", "evaluation.tokens=64")) == [Exit.DONE] * 2
    points = json.loads((root / "settings/evaluation.json").read_text())["points"]
    assert [point["name"] for point in points] == ["start", "ctx_32", "ctx_64", "ctx_128"]
    assert [point["sources"]["one"]["tokens"] > 64 for point in points] == [True, True, False, False]
    assert [row.name for row in bits_rows(read_run(root / "settings"))] == ["ctx_64", "ctx_128"]
