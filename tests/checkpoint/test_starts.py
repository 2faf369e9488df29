"""What a batch script does when its ranks have ended."""

from __future__ import annotations

import json

import pytest

from sbtrain.checkpoint.starts import next_start


def ended(folder, code=None, *, srun=1, signal="", reason="why", idle_starts=3):
    """The verdict on a start that left this code in exit.json; None left no file."""
    (folder / "exit.json").unlink(missing_ok=True)
    if code is not None:
        (folder / "exit.json").write_text(json.dumps({"code": code, "reason": reason}))
    start = {"job": "7", "signal": signal}
    return next_start(folder, start, code=srun, told_to_stop=bool(signal), idle_starts=idle_starts)


def save(folder, step):
    (folder / "ledger.json").write_text(
        json.dumps({"stages_done": [], "checkpoint": f"checkpoints/step_{step}", "step": step})
    )


@pytest.mark.parametrize(
    ("code", "srun", "verdict"),
    [
        (0, 0, "done"),
        (75, 75, "again"),
        (76, 137, "again"),
        (1, 1, "stop"),
        (2, 2, "stop"),
        (None, 137, "again"),  # killed before it could say anything
        (None, 2, "stop"),  # a bad recipe, before there was a run directory
        (None, 127, "stop"),  # no such interpreter on the node
    ],
)
def test_what_exit_json_says_counts(tmp_path, code, srun, verdict):
    assert ended(tmp_path, code, srun=srun)[0] == verdict


def test_errors_of_a_start_that_is_being_ended_are_no_verdict(tmp_path):
    """A pipe that breaks because Slurm ends the job, for example; but not for ever."""
    assert [ended(tmp_path, 1, signal="TERM")[0] for _ in range(3)] == ["again", "again", "stop"]
    assert ended(tmp_path, 0, srun=0, signal="TERM")[0] == "done"


def test_the_reason_is_one_line(tmp_path):
    assert ended(tmp_path, 1, reason="ValueError: a\nb")[1] == "code 1: ValueError: a b"
    (tmp_path / "exit.json").write_text("{")
    verdict, why = next_start(tmp_path, {}, code=1, told_to_stop=False, idle_starts=3)
    assert verdict == "again" and "\n" not in why


def test_starts_without_a_new_checkpoint_come_to_an_end(tmp_path):
    save(tmp_path, 5)
    assert [ended(tmp_path, 76)[0] for _ in range(3)] == ["again", "again", "stop"]
    assert "1 starts in a row made no new checkpoint" in ended(tmp_path, 76, idle_starts=1)[1]


def test_a_new_checkpoint_or_a_signal_begins_the_count_anew(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
        assert ended(tmp_path, 76, idle_starts=2)[0] == "again"
    assert [ended(tmp_path, signal="USR1", idle_starts=2)[0] for _ in range(5)] == ["again"] * 5
    assert [ended(tmp_path, idle_starts=2)[0] for _ in range(2)] == ["again", "stop"]


def test_a_start_that_finds_an_earlier_one_alive_does_not_count(tmp_path):
    """It leaves exit.json to the one that lives."""
    assert [ended(tmp_path, srun=75, idle_starts=2)[0] for _ in range(5)] == ["again"] * 5


def test_every_start_is_kept(tmp_path):
    save(tmp_path, 3)
    ended(tmp_path, 75, signal="USR1")
    ended(tmp_path, 0, srun=0)
    first, second = [json.loads(line) for line in (tmp_path / "slurm/starts.jsonl").read_text().splitlines()]
    assert (first["job"], first["code"], first["signal"], first["step"], first["next"]) == ("7", 75, "USR1", 3, "again")
    assert second["next"] == "done"
