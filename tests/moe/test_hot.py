"""Which experts are hot: they come above one load, stay down to another, and are never more than allowed."""

from __future__ import annotations

import pytest

from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.moe.hot import HotExperts


class Group:
    """A group of two ranks, seen from the first."""

    def size(self) -> int:
        return 2


@pytest.fixture
def hot():
    return HotExperts(
        None, num_experts=4, options=ExpertsConfig(max_copies=2, copy_above=2.0, release_below=1.0), group=Group()
    )


def test_hot_experts_come_above_one_load_and_stay_down_to_another(hot):
    loads = [[2.0, 1, 0.5, 0.5], [2.1, 1, 0.5, 0.4], [1.0, 1, 1, 1], [0.99, 1.01, 1, 1], [1.5, 0.5, 1, 1]]
    seen = []
    for load in loads:
        hot.choose(load)
        seen.append(hot.chosen)
    assert seen == [(), (0,), (0,), (), ()]


def test_the_hottest_win_and_are_named_in_order(hot):
    hot.choose([2.5, 0.0, 3.0, 2.4])
    assert hot.chosen == (0, 2)


def test_a_checkpoints_choice_is_cut_to_what_is_wanted_now(hot):
    hot.take_over([1, 2, 3])
    assert hot.chosen == (1, 2)
