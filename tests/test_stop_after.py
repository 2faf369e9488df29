"""stop_after: a start that ends where a stage does, so that the next one may have another world."""

from __future__ import annotations

import json

from command_line import ONE_PROCESS
from run_case import curve, tiny_recipe
from sbtrain.checkpoint.ledger import Ledger

TWO = ("~stages.ctx_128", "stages.ctx_64.layout.pp=1", "evaluation.tokens=0")


def exit_of(site) -> dict:
    return json.loads((site.run_dir / "exit.json").read_text())


def test_stages_one_start_each_are_the_run(site):
    """Start by start the same losses as in one go; what belongs to the end of a run waits for it."""
    assert site.train(*TWO, "stop_after=ctx_32")[0] == 0
    assert exit_of(site) == {"code": 0, "reason": "stage ctx_32 is done, ctx_64 comes next"}
    assert Ledger(site.run_dir).unfinished(["ctx_32", "ctx_64"]) == ["ctx_64"]
    assert not (site.run_dir / "report").exists()
    assert site.train(*TWO, "stop_after=ctx_32")[0] == 0 and Ledger(site.run_dir).step == 6
    assert site.train(*TWO, "stop_after=ctx_64")[0] == 0
    assert exit_of(site)["reason"] == "all stages are done" and (site.run_dir / "report").exists()
    whole = site.root / "whole"
    assert site._train([f"recipe={site.recipe}", f"run_dir={whole}", *TWO]) == 0
    assert curve(site.run_dir) == curve(whole)


def test_stages_of_other_starts_need_not_fit_this_world(site):
    """ctx_64 wants two pipeline stages; this is one process."""
    assert site.train("~stages.ctx_128", "evaluation.tokens=0", "stop_after=ctx_32")[0] == 0
    code, line = site.train("~stages.ctx_128", "evaluation.tokens=0", "stages.ctx_64.num_nodes=1")
    assert code == 2 and "stages.ctx_64: layout" in line


def test_a_stage_that_is_not_there(site):
    site.refuses((*ONE_PROCESS, "stop_after=ctx_8k"), ["stop_after=ctx_8k is no stage", "ctx_32, ctx_64, ctx_128"])
    assert tiny_recipe(site.root, "run", "stop_after=ctx_64").stop_after == "ctx_64"
