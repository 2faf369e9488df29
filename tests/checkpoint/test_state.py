"""RunState: what a step and a stage change boundary do to it, and its way through a file."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from sbtrain.checkpoint.state import RunState


def test_a_step_counts_and_forgets_where_the_loader_was():
    state = RunState(stage="a", step=4, tokens=100, stage_tokens=60, loader={"num_samples": 5}).advanced(20)
    assert state == RunState(stage="a", step=5, tokens=120, stage_tokens=80, loader=None)


def test_the_next_stage_begins_its_own_budget_and_goes_on_counting():
    state = RunState(stage="a", step=4, tokens=100, stage_tokens=60, loader={"num_samples": 5}).entering("b")
    assert state == RunState(stage="b", step=4, tokens=100, stage_tokens=0, loader=None)


def test_a_file_keeps_all_of_it():
    state = RunState(stage="a", step=4, tokens=2**53 + 1, stage_tokens=60, loader={"num_samples": 5, "identity": "x"})
    assert RunState(**json.loads(json.dumps(state.to_json()))) == state


def test_it_does_not_change():
    with pytest.raises(FrozenInstanceError):
        RunState(stage="a").step = 3
