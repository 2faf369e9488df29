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


class Damaged(ValueError):
    """What somebody may want to tell from other mistakes."""


def name_what_is_raised(rank: int) -> str:
    """Rank 1 raises an exception of a class of its own."""

    def fail():
        if rank == 1:
            raise Damaged("c.idx is damaged")

    try:
        together(fail)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


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


def test_the_rank_that_raises_keeps_the_class(run_ranks):
    assert run_ranks(2)(name_what_is_raised) == ["ValueError: c.idx is damaged", "Damaged: c.idx is damaged"]
