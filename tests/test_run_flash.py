"""A run whose checkpoints are written in the background: same curve, stopped and gone on with, and its metrics."""

from __future__ import annotations

import json

from run_case import curve, run_until, tiny_recipe, write_inputs
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.manifest import fault

FEW = ("evaluation.tokens=0", "stop_after=ctx_64")
BACKGROUND = ("checkpoint.asynchronous=true", "checkpoint.snapshot_every_steps=1")


def test_a_run_that_saves_in_the_background_goes_on_exactly(run_ranks, tmp_path):
    """Stopped between two saves; two stages, which two layouts train."""
    write_inputs(tmp_path)
    ranks = run_ranks(2, timeout_s=300)
    assert ranks(run_until, tiny_recipe(tmp_path, "whole", *FEW)) == [0, 0]
    recipe = tiny_recipe(tmp_path, "flash", *FEW, *BACKGROUND)
    assert ranks(run_until, recipe, 5) == [75, 75]
    ledger = Ledger(tmp_path / "flash")
    assert ledger.step == 5, "the newest state was written before the exit"
    assert fault(ledger.checkpoint) is None
    assert ranks(run_until, recipe) == [0, 0]
    assert curve(tmp_path / "flash") == curve(tmp_path / "whole")
    records = [json.loads(line) for line in (tmp_path / "flash/metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if "checkpoint_blocked_s" in record]
    assert found and all(record["checkpoint_bytes"] > 0 for record in found)
    assert any("checkpoint_first_s" in record for record in found)
    ends = [record for record in records if record["step"] in (6, 10)]
    assert ends[-1] == records[-1], "the last save of all is in the last record"
    assert all(record["checkpoint_wait_s"] > 0 and record["checkpoint_blocked_s"] > 0 for record in ends)
