"""Which layers run on which pipeline stage: contiguous chunks, uneven where costs are, as even in cost as they go.

With vpp chunks a stage, chunk c of stage s is the c·pp + s-th run of layers: the first run of every stage, then the
second of every stage (megatron's interleaving).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

BACKWARD = 2.0
"""A backward pass costs this many forward passes."""


class Action(NamedTuple):
    """What a stage does next: the forward or backward pass of one row through one of its chunks."""

    backward: bool
    row: int
    chunk: int


def split_layers(
    costs: list[float], *, pp: int, vpp: int = 1, first_extra: float = 0.0, last_extra: float = 0.0
) -> list[range]:
    """Ranges of 0-based layers, one a chunk, pp·vpp of them in the order of the layers.

    They minimize the largest cost of a chunk. With vpp > 1 a stage has several, so boundaries are then moved by one
    layer as long as a step of 2 pp rows gets shorter (see step_time). Ties go to earlier stages.
    costs: one positive number a layer, in any unit. first_extra, last_extra: the embedding's and the head's cost in
    the same unit. Raises ValueError when there are fewer layers than chunks.
    """
    num_layers, num_chunks = len(costs), pp * vpp
    if num_chunks > num_layers:
        asked, smaller = (f"{pp} x vpp={vpp}", "vpp or pp") if vpp > 1 else (f"{pp}", "pp")
        raise ValueError(f"layout.pp={asked} is more than the {num_layers} layers; choose a smaller {smaller}")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def chunk_cost(start: int, end: int) -> float:
        extra = (first_extra if start == 0 else 0.0) + (last_extra if end == num_layers else 0.0)
        return before[end] - before[start] + extra

    ends = _cheapest_chunks(num_layers, num_chunks, chunk_cost)
    if vpp > 1:
        ends = _shortest_step(ends, pp, chunk_cost)
    return ranges_between(ends)


def ranges_between(ends: list[int]) -> list[range]:
    """Consecutive ranges from 0 that end there."""
    return [range(start, end) for start, end in zip([0, *ends], ends)]


def stage_chunks(chunks: list, stage: int, *, pp: int) -> list:
    """Those of the chunks, given in the order of the layers, that a stage holds."""
    return chunks[stage::pp]


def actions(*, pp: int, vpp: int, stage: int, num_rows: int) -> list[Action]:
    """What a stage does in a step, in the order of megatron's schedules: 1F1B, interleaved where vpp > 1."""
    forward = [
        (row, chunk)
        for first in range(0, num_rows, pp)
        for chunk in range(vpp)
        for row in range(first, min(first + pp, num_rows))
    ]
    ahead = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    ahead = min(ahead, len(forward))
    order = [Action(False, row, chunk) for row, chunk in forward[:ahead]]
    for done, (row, chunk) in enumerate(forward):
        if ahead + done < len(forward):
            order.append(Action(False, *forward[ahead + done]))
        order.append(Action(True, row, vpp - 1 - chunk))
    return order


def most_in_flight(sizes: list[float], *, pp: int, stage: int, num_rows: int) -> float:
    """The most that a stage keeps at a time of its rows' activations.

    sizes: what one row leaves in each of the stage's chunks, in any unit, until its backward pass has gone through that
    chunk. num_rows: rows of a step.
    """
    held = most = 0.0
    num_rows = min(num_rows, 3 * pp)  # more rows repeat what these do
    for action in actions(pp=pp, vpp=len(sizes), stage=stage, num_rows=num_rows):
        held += -sizes[action.chunk] if action.backward else sizes[action.chunk]
        most = max(most, held)
    return most


def step_time(costs: list[float], *, pp: int, num_rows: int) -> float:
    """How long a step takes if nothing but the stages' work takes time.

    costs: forward cost of a row in each chunk, in the order of the layers; the unit is that of the result. num_rows: a
    multiple of pp where stages have several chunks.
    """
    last, vpp = len(costs) - 1, len(costs) // pp
    orders = [actions(pp=pp, vpp=vpp, stage=stage, num_rows=num_rows) for stage in range(pp)]
    done: dict[tuple[bool, int, int], float] = {}
    clocks, nexts = [0.0] * pp, [0] * pp
    while any(at < len(order) for at, order in zip(nexts, orders)):
        for stage, order in enumerate(orders):
            for backward, row, chunk in order[nexts[stage] :]:
                place = chunk * pp + stage
                if backward:
                    needs = (True, row, place + 1) if place < last else (False, row, place)
                else:
                    needs = (False, row, place - 1)
                if place > 0 or backward:
                    if needs not in done:
                        break
                    clocks[stage] = max(clocks[stage], done[needs])
                clocks[stage] += costs[place] * (BACKWARD if backward else 1.0)
                done[backward, row, place] = clocks[stage]
                nexts[stage] += 1
    return max(clocks)


def _cheapest_chunks(num_layers: int, num_chunks: int, chunk_cost: Callable[[int, int], float]) -> list[int]:
    """Ends of the chunks whose dearest is cheapest."""
    best = {0: (0.0, [])}
    for chunk in range(num_chunks):
        left = num_chunks - chunk - 1
        ends = range(chunk + 1, num_layers - left + 1) if left else [num_layers]
        best = {end: _best_end(best, end, chunk_cost) for end in ends}
    return best[num_layers][1]


def _best_end(best: dict, end: int, chunk_cost) -> tuple[float, list[int]]:
    options = (
        (max(worst, chunk_cost(start, end)), [*ends, end]) for start, (worst, ends) in best.items() if start < end
    )
    return min(options, key=lambda option: option[0])


def _shortest_step(ends: list[int], pp: int, chunk_cost: Callable[[int, int], float]) -> list[int]:
    """Move boundaries by one layer, one at a time, as long as a step gets shorter."""

    def time_of(ends: list[int]) -> float:
        return step_time([chunk_cost(part.start, part.stop) for part in ranges_between(ends)], pp=pp, num_rows=2 * pp)

    here = time_of(ends)
    while True:
        there, moved = min((time_of(option), option) for option in _one_layer_moved(ends))
        if there >= here * (1 - 1e-9):
            return ends
        here, ends = there, moved


def _one_layer_moved(ends: list[int]) -> list[list[int]]:
    """The boundaries themselves, and with each of them a layer further left or right; every chunk keeps a layer."""
    moved = [
        [end + by * (place == i) for place, end in enumerate(ends)] for i in range(len(ends) - 1) for by in (-1, 1)
    ]
    return [ends, *(option for option in moved if all(len(part) for part in ranges_between(option)))]
