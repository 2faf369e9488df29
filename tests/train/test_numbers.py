"""Numbers: spikes by a robust score, skipped steps by a window, both as before after a resume."""

from __future__ import annotations

import json
import math

import pytest

from parallel.mesh import start_distributed
from sbtrain.checkpoint.state import RunState
from sbtrain.config.schema import OnSpike, WatchConfig
from sbtrain.train.numbers import FILE, LEAST_LOSSES, ROLLBACKS, Numbers


@pytest.fixture(autouse=True)
def _one_rank():
    start_distributed()


def judged(numbers: Numbers, losses, first: int = 1, origin=None) -> list[dict]:
    """What is said of steps with these losses."""
    states = [RunState(stage="a", step=step) for step in range(first, first + len(losses))]
    return [numbers.check(state, loss=loss, grad_norm=1.0, origin=origin) for state, loss in zip(states, losses)]


def wavy(count: int, level: float = 3.0) -> list[float]:
    return [level + 0.02 * math.sin(2.3 * step) for step in range(count)]


def begun(tmp_path, state: RunState | None = None, **rules) -> Numbers:
    numbers = Numbers(WatchConfig(**rules), tmp_path)
    numbers.begin(state or RunState(stage="a"))
    return numbers


def test_a_spike_is_told_and_does_not_hide_the_next(tmp_path, capsys):
    numbers = begun(tmp_path, window_steps=50)
    scores = [said["loss_score"] for said in judged(numbers, [*wavy(60), 3.4, *wavy(4), 3.3, 2.0])]
    assert scores[:LEAST_LOSSES] == [None] * LEAST_LOSSES
    assert max(abs(score) for score in scores[LEAST_LOSSES:60]) < 3
    assert scores[60] > 15 and scores[65] > 10 and scores[66] < -30
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("warning: step 61 of stage a: loss 3.4000 is a spike, ")
    assert "standard deviations above 3.0" in said[0] and "the median of 50 steps" in said[0]


def test_another_level_becomes_the_usual_one(tmp_path):
    numbers = begun(tmp_path, window_steps=40)
    judged(numbers, wavy(40))
    scores = [said["loss_score"] for said in judged(numbers, wavy(40, level=3.5), first=41)]
    assert scores[0] > 10 and abs(scores[-1]) < 3


def test_a_loss_that_hardly_moves_has_no_spikes(tmp_path, capsys):
    judged(begun(tmp_path), [2.0] * 30 + [2.0001])
    judged(begun(tmp_path, spike_score=0.0), [*wavy(30), 9.0])
    assert capsys.readouterr().out == ""


def test_a_resumed_run_judges_alike_and_another_stage_afresh(tmp_path):
    losses = [*wavy(30), math.nan, *wavy(9), 3.2]
    whole = judged(begun(tmp_path), losses)
    first = begun(tmp_path)
    judged(first, losses[:35])
    kept = json.loads(json.dumps(first.state_dict()))
    assert judged(begun(tmp_path, RunState(stage="a", step=35, watch=kept)), losses[35:], first=36) == whole[35:]
    fresh = begun(tmp_path, RunState(stage="b", step=35, watch=kept))
    assert judged(fresh, [9.0], first=36) == [{"loss_score": None, "skipped_steps": 1}]
    assert begun(tmp_path, RunState(stage="a")).num_skipped == 0


def test_skipped_steps_are_listed_and_those_done_again_replaced(tmp_path, capsys):
    origin = lambda: {"first_sample": 8, "num_samples": 4, "suspects": []}  # noqa: E731
    said = judged(begun(tmp_path), [3.0, math.inf, 3.0, math.nan], origin=origin)
    assert [one.get("skipped", False) for one in said] == [False, True, False, True]
    assert "step 2 of stage a: loss inf, gradient norm 1.0: skipped, no. 1 of the run" in capsys.readouterr().out
    judged(begun(tmp_path, RunState(stage="a", step=3)), [math.nan], first=4)
    entries = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(entry["step"], entry["loss"], entry.get("first_sample")) for entry in entries] == [
        (2, "inf", 8),
        (4, "nan", None),
    ]


def test_too_many_in_the_window_stop_the_run(tmp_path):
    rules = dict(max_skipped_steps=2, window_steps=20)
    sparse = [math.nan if step % 10 == 0 else 3.0 for step in range(60)]
    assert judged(begun(tmp_path, **rules), sparse)[-1]["skipped_steps"] == 6
    with pytest.raises(ValueError, match=r"step 4 of stage a: loss nan.*3 of the last 20 steps.*schedule\.lr"):
        judged(begun(tmp_path, **rules), [math.nan, math.nan, 3.0, math.nan])
    assert len((tmp_path / FILE).read_text().splitlines()) == 3


def test_files_say_nothing_of_steps_that_are_done_again(tmp_path):
    """A start from step 3 does step 4 again, which may go another way this time."""
    first = begun(tmp_path, on_spike=OnSpike.rollback)
    judged(first, [3.0, math.nan, 3.0, math.nan])
    first.go_back(RunState(stage="a", step=4), RunState(stage="a", step=1), {"records": [1]})
    assert not (tmp_path / FILE).read_text()  # steps 2 and 4 are gone back from
    judged(first, [math.nan, 3.0], first=2)
    kept = RunState(stage="a", step=3, watch=json.loads(json.dumps(first.state_dict())))
    assert (kept.watch["num_rollbacks"], kept.watch["rollbacks"], kept.watch["num_skipped"]) == (1, [1], 1)
    first.go_back(RunState(stage="a", step=5), RunState(stage="a", step=1), {"records": [2]})
    begun(tmp_path, kept)
    entries = [json.loads(line) for line in (tmp_path / ROLLBACKS).read_text().splitlines()]
    assert [(entry["rollback"], entry["step"], entry["from_step"], entry["records"]) for entry in entries] == [
        (1, 1, 4, [1])
    ]
    begun(tmp_path)
    assert not (tmp_path / ROLLBACKS).read_text()


@pytest.mark.parametrize("later", [2, 500])
def test_rollbacks_count_by_where_they_went_to(tmp_path, later):
    """Also where a spike comes back long after its checkpoint, for which no window is long enough."""
    numbers = begun(tmp_path, window_steps=20, max_rollbacks=2)
    for restored in (10, 10, 40, 45):
        ends = RunState(stage="a", step=restored + later), RunState(stage="a", step=restored)
        numbers.check_rollbacks(*ends)
        numbers.go_back(*ends, {})
    ends = RunState(stage="a", step=50 + later), RunState(stage="a", step=50)
    with pytest.raises(ValueError, match=rf"step {50 + later} of stage a: .* after 2 rollbacks to step 50"):
        numbers.check_rollbacks(*ends)
    numbers.check_rollbacks(RunState(stage="a", step=600), RunState(stage="a", step=65))


def skip_where_nothing_can_be_written(rank: int, folder: str) -> str:
    """What a skipped step raises on this rank."""
    numbers = begun(folder)
    try:
        numbers.check(RunState(stage="a", step=1), loss=math.nan, grad_norm=1.0, origin=None)
    except ValueError as error:
        return str(error)


def test_what_rank_0_cannot_write_ends_all_ranks(tmp_path, run_ranks):
    """They would wait for it otherwise."""
    (tmp_path / "run").write_text("a file where the folder should be")
    first, second = run_ranks(2)(skip_where_nothing_can_be_written, tmp_path / "run")
    assert first == second and f"{FILE}: cannot write" in first
