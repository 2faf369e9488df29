"""split_layers: every stage has layers, in order, and no other split has a cheaper dearest stage."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from parallel.pipeline import split_layers


def _dearest(costs: list[float], bounds: tuple[int, ...], first_extra: float, last_extra: float) -> float:
    """Cost of the dearest stage when stage i is layers bounds[i] .. bounds[i+1]-1."""
    stages = [sum(costs[start:stop]) for start, stop in zip(bounds, bounds[1:])]
    stages[0] += first_extra
    stages[-1] += last_extra
    return max(stages)


@pytest.mark.parametrize("seed", range(40))
def test_no_split_is_better(seed):
    dice = random.Random(seed)
    num_layers = dice.randint(1, 9)
    pp = dice.randint(1, num_layers)
    costs = [dice.choice([1.0, 2.0, 5.0, dice.random() + 0.1]) for _ in range(num_layers)]
    extras = dice.choice([0.0, 3.0, 20.0]), dice.choice([0.0, 3.0, 20.0])
    layers = split_layers(costs, pp=pp, first_extra=extras[0], last_extra=extras[1])
    assert len(layers) == pp and all(len(stage) for stage in layers)
    assert [i for stage in layers for i in stage] == list(range(num_layers))
    found = _dearest(costs, (0, *(stage.stop for stage in layers)), *extras)
    every = (_dearest(costs, (0, *inner, num_layers), *extras) for inner in combinations(range(1, num_layers), pp - 1))
    assert found == pytest.approx(min(every), rel=1e-12)


def test_a_dear_head_takes_layers_off_the_last_stage():
    assert split_layers([1.0] * 8, pp=2) == [range(4), range(4, 8)]
    assert split_layers([1.0] * 8, pp=2, last_extra=4.0) == [range(6), range(6, 8)]
    assert split_layers([1.0] * 8, pp=2, first_extra=4.0) == [range(2), range(2, 8)]
    assert split_layers([1.0] * 4, pp=4, last_extra=9.0) == [range(i, i + 1) for i in range(4)]


def test_fewer_layers_than_stages_are_refused():
    with pytest.raises(ValueError, match=r"layout\.pp=4 is more than the 3 layers; choose a smaller pp"):
        split_layers([1.0] * 3, pp=4)
