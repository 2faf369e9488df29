"""How layers are split over pipeline stages, and in which order and how long stages work."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from layout_case import one_step, packed_rows, small_model
from parallel.layout import Layout
from parallel.pipeline import actions, most_in_flight, ranges_between, split_layers, stage_chunks, step_time


def _dearest(costs: list[float], bounds: tuple[int, ...], first_extra: float, last_extra: float) -> float:
    """Cost of the dearest stage when stage i is layers bounds[i] .. bounds[i+1]-1."""
    return max(_chunk_costs(costs, bounds[1:], first_extra, last_extra))


def _chunk_costs(costs: list[float], ends, first_extra: float = 0.0, last_extra: float = 0.0) -> list[float]:
    chunks = [sum(costs[part.start : part.stop]) for part in ranges_between(list(ends))]
    chunks[0] += first_extra
    chunks[-1] += last_extra
    return chunks


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


@pytest.mark.parametrize("seed", range(20))
def test_chunks_make_no_step_longer_than_the_cheapest_dearest_chunk_does(seed):
    dice = random.Random(seed)
    pp, vpp = dice.choice([2, 3, 4]), dice.choice([2, 3])
    costs = [dice.choice([1.0, 1.7, dice.random() + 0.2]) for _ in range(pp * vpp + dice.randint(0, 12))]
    head = dice.choice([0.0, 1.0, 2.5])
    layers = split_layers(costs, pp=pp, vpp=vpp, last_extra=head)
    assert len(layers) == pp * vpp and all(len(chunk) for chunk in layers)
    assert [i for chunk in layers for i in chunk] == list(range(len(costs)))
    even = split_layers(costs, pp=pp * vpp, last_extra=head)

    def time_of(split):
        ends = [part.stop for part in split]
        return step_time(_chunk_costs(costs, ends, last_extra=head), pp=pp, num_rows=2 * pp)

    assert time_of(layers) <= time_of(even)
    for i in range(pp * vpp - 1):
        ends = [part.stop + (place == i) for place, part in enumerate(layers)]
        if all(len(part) for part in ranges_between(ends)):
            assert time_of(ranges_between(ends)) >= time_of(layers) * (1 - 1e-9)


def test_a_dear_head_takes_layers_off_the_last_stage():
    assert split_layers([1.0] * 8, pp=2) == [range(4), range(4, 8)]
    assert split_layers([1.0] * 8, pp=2, last_extra=4.0) == [range(6), range(6, 8)]
    assert split_layers([1.0] * 8, pp=2, first_extra=4.0) == [range(2), range(2, 8)]
    assert split_layers([1.0] * 4, pp=4, last_extra=9.0) == [range(i, i + 1) for i in range(4)]
    chunks = split_layers([1.0] * 28, pp=4, vpp=2, last_extra=2.3)
    assert [len(chunk) for chunk in chunks][-1] == 1 and max(len(chunk) for chunk in chunks) == 4


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"layout\.pp=4 is more than the 3 layers; choose a smaller pp"):
        split_layers([1.0] * 3, pp=4)
    with pytest.raises(ValueError, match=r"layout\.pp=2 x vpp=2 is more than the 3 layers; choose a smaller vpp or pp"):
        split_layers([1.0] * 3, pp=2, vpp=2)


@pytest.mark.parametrize("pp, vpp, num_rows", [(4, 1, 3), (4, 1, 16), (4, 2, 8), (2, 3, 6), (1, 1, 5)])
def test_even_stages_wait_at_the_ends_alone(pp, vpp, num_rows):
    """Every stage works 3 vpp a row; the last one begins pp - 1 chunks late, and the first one ends as much later."""
    assert step_time([1.0] * (pp * vpp), pp=pp, num_rows=num_rows) == 3 * vpp * num_rows + 3 * (pp - 1)


@pytest.mark.parametrize("pp, vpp, num_rows", [(4, 1, 2), (4, 1, 40), (4, 2, 4), (4, 2, 40), (3, 3, 30), (2, 4, 20)])
def test_what_stages_keep(pp, vpp, num_rows):
    for stage in range(pp):
        sizes = [1.0 + chunk / 8 for chunk in range(vpp)]
        held, levels = 0.0, []
        for action in actions(pp=pp, vpp=vpp, stage=stage, num_rows=num_rows):
            held += (-1 if action.backward else 1) * sizes[action.chunk]
            levels.append(held)
        assert levels[-1] == 0 and len(levels) == 2 * vpp * num_rows
        assert most_in_flight(sizes, pp=pp, stage=stage, num_rows=num_rows) == max(levels)
        if vpp == 1:
            assert max(levels) == min(num_rows, pp - stage)


def recorded_step(rank: int, layout: Layout, model, rows) -> list[tuple]:
    """What megatron's schedule had this rank do in its first step: (backward, number of the row, first layer)."""
    from megatron.core.pipeline_parallel import schedules

    from sbtrain.model.hybrid import HybridModel

    forward, backward_step, found = HybridModel.forward, schedules.backward_step, []
    numbers = {int(row.tokens[0]): number for number, row in enumerate(rows)}

    def note(self, tokens, *rest):
        found.append((False, numbers[int(tokens[0])], self.decoder.first_layer))
        return forward(self, tokens, *rest)

    def note_backward(*args):
        found.append((True,))
        return backward_step(*args)

    HybridModel.forward, schedules.backward_step = note, note_backward
    try:
        one_step(rank, layout, model, rows)
    finally:
        HybridModel.forward, schedules.backward_step = forward, backward_step
    return found[: len(found) // 2]


@pytest.mark.parametrize("pp, vpp, num_rows", [(2, 2, 4), (2, 1, 3), (2, 2, 2)])
def test_actions_are_those_of_megatrons_schedules(pp, vpp, num_rows, run_ranks):
    layout = Layout(pp=pp, vpp=vpp, pp_layers=(1,) * (pp * vpp))
    model, rows = small_model(num_layers=pp * vpp, pattern="L"), packed_rows(num_rows, 16, 120)
    for stage, found in enumerate(run_ranks(pp)(recorded_step, layout, model, rows)):
        first_layers = stage_chunks(list(range(pp * vpp)), stage, pp=pp)
        planned = actions(pp=pp, vpp=vpp, stage=stage, num_rows=num_rows)
        expected = [(True,) if a.backward else (False, a.row, first_layers[a.chunk]) for a in planned]
        assert found == expected
