"""A run whose loss spikes goes back to a checkpoint or a snapshot, past the samples since; it resumes bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from run_case import curve, run_until, tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit
from sbtrain.checkpoint.store import Store
from sbtrain.data.loader import Loader
from sbtrain.train import numbers

ROLLBACK = ("watch.on_spike=rollback", "watch.window_steps=20", "watch.measure_every_steps=1")
STAGES = ("stages.ctx_32.tokens=1280", "evaluation.tokens=0")
TWO_STAGES, ONE_STAGE = (*STAGES, "stop_after=ctx_64"), (*STAGES, "stop_after=ctx_32")


def run_spiking(
    rank: int,
    recipe,
    spikes: list[int],
    stop_at_step: int | None = None,
    *,
    start_at=None,
    stage="ctx_32",
    dies_at=None,
) -> int:
    """Run the recipe; rank 0 alone sees a loss that spikes where the loader of a stage stands at one of `spikes`.

    spikes: samples consumed by that stage. dies_at: samples at which a stage ends with an error. A stage is too short
    for scores otherwise: 4 losses suffice here. start_at: samples that the loader goes on with instead of what the
    checkpoint says. Every snapshot that is due is taken: the disk is waited for.
    """
    check, load, least = numbers.Numbers.check, Loader.load_state_dict, numbers.LEAST_LOSSES
    next_step, snapshot, at = Loader.next_step, Store.snapshot, {}

    def check_spiking(self, state, *, loss, grad_norm, origin):
        spiking = rank == 0 and at["samples"] in spikes and state.stage == stage
        return check(self, state, loss=loss + 9 * spiking, grad_norm=grad_norm, origin=origin)

    def note_and_next(self):
        rows = next_step(self)
        at["samples"] = self.num_samples
        if dies_at == self.num_samples:
            raise RuntimeError("the end")
        return rows

    def load_elsewhere(self, state):
        load(self, state if start_at is None else {**state, "num_samples": start_at})

    def settle_and_snapshot(self, engine, state):
        self.flash.settle()
        snapshot(self, engine, state)

    numbers.Numbers.check, numbers.LEAST_LOSSES = check_spiking, 4
    Store.snapshot = settle_and_snapshot
    Loader.next_step, Loader.load_state_dict = note_and_next, load_elsewhere
    try:
        return run_until(rank, recipe, stop_at_step)
    finally:
        numbers.Numbers.check, numbers.LEAST_LOSSES = check, least
        Loader.next_step, Loader.load_state_dict, Store.snapshot = next_step, load, snapshot


def rollbacks(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rollbacks.jsonl").read_text().splitlines()]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory, run_ranks):
    """Ten steps of 4 samples, checkpoints at 3, 6, 9; the step that consumes samples 28 to 31, the 8th, spikes."""
    root = tmp_path_factory.mktemp("rollback")
    write_inputs(root)
    assert run_ranks(2)(run_spiking, tiny_recipe(root, "whole", *TWO_STAGES, *ROLLBACK), [32]) == [Exit.DONE] * 2
    return root, curve(root / "whole")


def test_it_is_the_run_from_there_with_other_samples(gone_back, run_ranks):
    root, steps = gone_back
    recipe = tiny_recipe(root, "by_hand", *ONE_STAGE, "watch.window_steps=20")
    assert run_ranks(2)(run_spiking, recipe, [], 6) == [Exit.REQUEUE] * 2
    assert curve(root / "by_hand") == steps[:6]
    assert run_ranks(2)(run_spiking, recipe, [], start_at=32) == [Exit.DONE] * 2
    assert curve(root / "by_hand") == steps[:10]
    assert [step[0] for step in steps] == list(range(1, 15))


def test_what_it_says(gone_back):
    root, steps = gone_back
    found = records(root / "whole")
    assert [record.get("rollbacks", 0) for record in found] == [0] * 6 + [1] * 8
    assert [record["step"] for record in found if "rolled_back_from_step" in record] == [7]
    (said,) = rollbacks(root / "whole")
    assert [said[key] for key in ("rollback", "step", "from_step", "stage")] == [1, 6, 8, "ctx_32"]
    assert (said["first_sample"], said["num_samples"]) == (24, 8)
    assert [record["step"] for record in said["records"]] == [7, 8]
    assert said["records"][1]["loss_score"] > 6 and said["records"][1]["tokens"] == steps[7][1]


@pytest.mark.parametrize("stop", [8, 10])
def test_interrupted_at_or_after_it_is_the_same_run(gone_back, run_ranks, stop):
    """At 8 the signal comes with the spike: the run goes back, stops, and the next start goes on with other samples."""
    root, steps = gone_back
    recipe = tiny_recipe(root, f"stop_{stop}", *ONE_STAGE, *ROLLBACK)
    assert run_ranks(2)(run_spiking, recipe, [32], stop) == [Exit.REQUEUE if stop == 8 else Exit.DONE] * 2
    assert json.loads((root / f"stop_{stop}/ledger.json").read_text())["step"] == (6 if stop == 8 else 10)
    assert run_ranks(2)(run_spiking, tiny_recipe(root, f"stop_{stop}", *TWO_STAGES, *ROLLBACK), []) == [Exit.DONE] * 2
    assert curve(root / f"stop_{stop}") == steps
    assert [record["step"] for record in records(root / recipe.run_dir) if "rolled_back_from_step" in record] == [7]
    assert "rolled_back" not in json.loads((root / recipe.run_dir / "ledger.json").read_text())
    ours, theirs = rollbacks(root / f"stop_{stop}"), rollbacks(root / "whole")
    for said in (*ours, *theirs):
        said["records"] = [(record["step"], record["loss"], record["loss_score"]) for record in said["records"]]
    assert ours == theirs


def test_from_memory_it_is_the_run_that_went_back_to_a_checkpoint_of_that_step(gone_back, run_ranks):
    """There is none on the disk. A signal comes with the spike: the snapshot is saved, and the next start goes on."""
    root, _ = gone_back
    recipe = tiny_recipe(root, "every_7", *ONE_STAGE, *ROLLBACK, "checkpoint.every_steps=7")
    assert run_ranks(2)(run_spiking, recipe, [32]) == [Exit.DONE] * 2
    few = ("checkpoint.every_steps=0", "checkpoint.asynchronous=true", "checkpoint.snapshot_every_steps=7")
    recipe = tiny_recipe(root, "memory", *ONE_STAGE, *ROLLBACK, *few)
    assert run_ranks(2)(run_spiking, recipe, [32], 8) == [Exit.REQUEUE] * 2
    assert json.loads((root / "memory/ledger.json").read_text())["step"] == 7
    (said,) = rollbacks(root / "memory")
    assert [said[key] for key in ("step", "from_step", "first_sample", "num_samples")] == [7, 8, 28, 4]
    assert run_ranks(2)(run_spiking, recipe, [32]) == [Exit.DONE] * 2
    assert curve(root / "memory") == curve(root / "every_7")
    assert [step[0] for step in curve(root / "memory")] == list(range(1, 11))


def test_what_a_snapshot_did_not_help_goes_back_to_the_checkpoint_behind_it(gone_back, run_ranks):
    """Checkpoint at 4, snapshots at 7: the first spike, at 8, goes to the snapshot, the next one to the checkpoint."""
    root, _ = gone_back
    options = (*ONE_STAGE, *ROLLBACK, "checkpoint.every_steps=4", "checkpoint.asynchronous=true")
    recipe = tiny_recipe(root, "behind", *options, "checkpoint.snapshot_every_steps=7")
    assert run_ranks(2)(run_spiking, recipe, [32, 36]) == [Exit.DONE] * 2
    said = rollbacks(root / "behind")
    places = [[one[key] for key in ("step", "from_step", "first_sample", "num_samples")] for one in said]
    assert places == [[7, 8, 28, 4], [4, 8, 16, 20]]
    assert [step[0] for step in curve(root / "behind")] == list(range(1, 11))
    by_hand = tiny_recipe(root, "behind_by_hand", *ONE_STAGE, "watch.window_steps=20", "checkpoint.every_steps=4")
    assert run_ranks(2)(run_spiking, by_hand, [], 4) == [Exit.REQUEUE] * 2
    assert run_ranks(2)(run_spiking, by_hand, [], start_at=36) == [Exit.DONE] * 2
    assert curve(root / "behind") == curve(root / "behind_by_hand")


def test_at_the_beginning_of_a_stage_it_goes_back_to_the_end_of_the_one_before(gone_back, run_ranks):
    """Twice, and again after a start that died behind that: it goes on with the samples that were not left out."""
    root, _ = gone_back
    options = ("stages.ctx_32.tokens=768", "stages.ctx_64.tokens=1280", "stop_after=ctx_64", "evaluation.tokens=0")
    for name in ("boundary", "dies"):
        recipe = tiny_recipe(root, name, *options, *ROLLBACK, "checkpoint.every_steps=0")
        if name == "dies":
            with pytest.raises(RuntimeError, match="the end"):
                run_ranks(2)(run_spiking, recipe, [10, 20], stage="ctx_64", dies_at=14)
            ledger = json.loads((root / name / "ledger.json").read_text())
            assert (ledger["step"], ledger["rolled_back"]["loader"]["num_samples"]) == (6, 10)
        assert run_ranks(2)(run_spiking, recipe, [10, 20], stage="ctx_64") == [Exit.DONE] * 2
        said = rollbacks(root / name)
        places = [[one[key] for key in ("step", "from_step", "first_sample", "num_samples")] for one in said]
        assert places == [[6, 11, 0, 10], [6, 11, 0, 20]]
    assert curve(root / "dies") == curve(root / "boundary")
    assert [step[0] for step in curve(root / "boundary")] == list(range(1, 17))


def test_after_too_many_the_run_stops_and_so_does_the_next_start(gone_back, run_ranks):
    root, _ = gone_back
    recipe = tiny_recipe(root, "stops", *ONE_STAGE, *ROLLBACK, "watch.max_rollbacks=2")
    every = list(range(32, 80, 4))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"step 7 of stage ctx_32: .*after 2 rollbacks .*watch\.max_rollbacks"):
            run_ranks(2)(run_spiking, recipe, every)
        said = rollbacks(root / "stops")
        places = [[one[key] for key in ("step", "from_step", "first_sample", "num_samples")] for one in said]
        assert places == [[6, 8, 24, 8], [6, 7, 24, 12]]
        assert json.loads((root / "stops/ledger.json").read_text())["step"] == 6


@pytest.mark.parametrize("every_steps", [0, 3])
def test_one_rank_goes_back_as_two_do_and_without_a_checkpoint_not_at_all(gone_back, run_ranks, every_steps):
    root, steps = gone_back
    one_rank = (f"checkpoint.every_steps={every_steps}", "stages.ctx_64.layout.pp=1", "stages.ctx_128.layout.sp=1")
    recipe = tiny_recipe(root, f"alone_{every_steps}", *ONE_STAGE, *ROLLBACK, *one_rank)
    assert run_ranks(1)(run_spiking, recipe, [32]) == [Exit.DONE]
    mine, found = curve(root / recipe.run_dir), records(root / recipe.run_dir)
    assert [step[0] for step in mine] == list(range(1, 11))
    assert [record["step"] for record in found if (record["loss_score"] or 0) > 6] == ([] if every_steps else [8])
    assert (root / recipe.run_dir / "rollbacks.jsonl").exists() == bool(every_steps)
    if every_steps:
        assert [step[3] for step in mine] == pytest.approx([step[3] for step in steps[:10]], rel=1e-4)
