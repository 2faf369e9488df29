"""The learning rate at the boundaries of warmup, decay and stage, by hand."""

from __future__ import annotations

import pytest

from sbtrain.config.schema import Decay, Schedule
from sbtrain.train.schedule import learning_rate


def rates(schedule: Schedule, *tokens: int, total: int = 1000) -> list[float]:
    return [learning_rate(schedule, tokens=at, total_tokens=total) for at in tokens]


@pytest.mark.parametrize("decay", Decay)
def test_warmup_rises_evenly_from_more_than_nothing_to_the_peak(decay):
    schedule = Schedule(lr=1.01, min_lr=0.1, warmup_tokens=100, decay=decay)
    assert rates(schedule, 0, 49, 99) == pytest.approx([0.01, 0.5, 1.0])
    assert rates(schedule, 100) == [1.01]


@pytest.mark.parametrize("decay", Decay)
def test_without_warmup_the_first_step_has_the_peak(decay):
    assert rates(Schedule(lr=3e-4, min_lr=1e-5, decay=decay), 0) == [3e-4]


def test_constant_stays():
    assert rates(Schedule(lr=2.0, min_lr=1.0, warmup_tokens=10, decay=Decay.constant), 10, 500, 999, 1000) == [2.0] * 4


def test_cosine_runs_from_the_end_of_the_warmup_to_the_end_of_the_stage():
    schedule = Schedule(lr=3.0, min_lr=1.0, warmup_tokens=200, decay=Decay.cosine)
    quarter = 2 + 2**-0.5
    assert rates(schedule, 200, 400, 600, 800, 1000) == pytest.approx([3.0, quarter, 2.0, 4 - quarter, 1.0])
    assert rates(schedule, 1001, 5000) == pytest.approx([1.0, 1.0]), "a last step over the budget stays at min_lr"
    falling = rates(schedule, *range(200, 1001, 50))
    assert falling == sorted(falling, reverse=True)


def test_wsd_holds_the_peak_and_falls_linearly_over_the_last_fraction():
    schedule = Schedule(lr=3.0, min_lr=1.0, warmup_tokens=100, decay=Decay.wsd, decay_fraction=0.25)
    assert rates(schedule, 100, 500, 750) == [3.0, 3.0, 3.0]
    assert rates(schedule, 751, 875, 999, 1000, 1200) == pytest.approx([3 - 2 / 250, 2.0, 1 + 2 / 250, 1.0, 1.0])


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, [3.0, 3.0]), (1.0, [3.0, 2.0])])
def test_wsd_with_no_decay_and_with_nothing_but_decay(fraction, expected):
    schedule = Schedule(lr=3.0, min_lr=1.0, decay=Decay.wsd, decay_fraction=fraction)
    assert rates(schedule, 0, 500) == pytest.approx(expected)


def test_warmup_of_the_whole_stage_leaves_nothing_to_decay():
    for decay in (Decay.cosine, Decay.wsd):
        schedule = Schedule(lr=1.0, min_lr=0.5, warmup_tokens=1000, decay=decay, decay_fraction=0.0)
        assert rates(schedule, 999) == pytest.approx([1000 / 1001])
