"""Which layers run on which pipeline stage: contiguous, uneven where costs are, the dearest stage made cheapest."""

from __future__ import annotations


def split_layers(costs: list[float], *, pp: int, first_extra: float = 0.0, last_extra: float = 0.0) -> list[range]:
    """Ranges of 0-based layers, one a stage, that minimize the largest stage cost; ties go to earlier stages.

    costs: one positive number a layer, in any unit. first_extra, last_extra: the embedding's and the head's cost in
    the same unit. Raises ValueError when there are fewer layers than stages.
    """
    num_layers = len(costs)
    if pp > num_layers:
        raise ValueError(f"layout.pp={pp} is more than the {num_layers} layers; choose a smaller pp")

    def stage_cost(start: int, end: int) -> float:
        extra = (first_extra if start == 0 else 0.0) + (last_extra if end == num_layers else 0.0)
        return sum(costs[start:end]) + extra

    best = {0: (0.0, [])}
    for stage in range(pp):
        left = pp - stage - 1
        ends = range(stage + 1, num_layers - left + 1) if left else [num_layers]
        best = {end: _best_end(best, end, stage_cost) for end in ends}
    return best[num_layers][1]


def _best_end(best: dict, end: int, stage_cost) -> tuple[float, list[range]]:
    options = (
        (max(worst, stage_cost(start, end)), [*stages, range(start, end)])
        for start, (worst, stages) in best.items()
        if start < end
    )
    return min(options, key=lambda option: option[0])
