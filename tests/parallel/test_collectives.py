"""Ranks that fail together."""

from __future__ import annotations

import pytest

from parallel.collectives import together


def read_with_one_problem(rank: int, problem: Exception):
    """Rank 1 raises; every rank says how its call ended."""

    def read():
        if rank == 1:
            raise problem
        return "read"

    try:
        return together(read)
    except ValueError as error:
        return str(error)


def return_rank(rank: int):
    """Everything well."""
    return together(lambda: rank)


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (ValueError("c.idx is corrupt"), "c.idx is corrupt"),
        (OSError(5, "Input/output error", "/data/c.bin"), "/data/c.bin: Input/output error; make it readable"),
    ],
)
def test_what_one_rank_raises_all_ranks_raise(run_ranks, problem, line):
    assert all(answer.startswith(line) for answer in run_ranks(2)(read_with_one_problem, problem))
    assert run_ranks(2)(return_rank) == [0, 1]
