"""The rank pool itself: results, exceptions, time limits, death, and that what a case leaves behind is cleaned."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist


@dataclass
class Case:
    value: float


def total(rank, case, *, factor=1):
    tensor = torch.tensor([case.value + rank])
    dist.all_reduce(tensor)
    return Case(tensor.item() * factor)


def process_id(rank):
    return os.getpid(), os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), torch.rand(1).item()


def fail_on(rank, bad):
    if rank == bad:
        raise ValueError(f"layout: rank {rank} says no")
    dist.barrier()


def sleep_on(rank, bad, seconds):
    if rank == bad:
        time.sleep(seconds)


def die_on(rank, bad):
    if rank == bad:
        os._exit(3)


def leave_groups(rank):
    dist.destroy_process_group()


def empty_is_nan(rank):
    return torch.empty(4).isnan().all().item()


def unpicklable(rank):
    return lambda: rank


def test_results_come_in_rank_order_from_one_started_pool(run_ranks):
    results = run_ranks(2)(total, Case(10.0), factor=2)
    assert results == [Case(42.0), Case(42.0)]
    first, second = run_ranks(2)(process_id), run_ranks(2)(process_id)
    assert first == second
    assert first[0][0] != first[1][0]
    assert first[0][1:3] == ("1", 1)


def test_an_exception_keeps_its_type_and_names_the_rank(run_ranks):
    with pytest.raises(ValueError, match="rank 1 says no") as caught:
        run_ranks(2)(fail_on, 1)
    assert "--- rank 1 of 2 ---" in str(caught.value.__cause__)
    assert "in fail_on" in str(caught.value.__cause__)
    assert run_ranks(2)(total, Case(1.0)) == [Case(3.0)] * 2


def test_a_hanging_rank_ends_at_the_time_limit(run_ranks):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"sleep_on: ranks \[0\] of 2 still ran after 1 s"):
        run_ranks(2, timeout_s=1)(sleep_on, 0, 60)
    assert time.monotonic() - started < 30
    assert run_ranks(2)(total, Case(1.0)) == [Case(3.0)] * 2


def test_a_dead_rank_is_named_and_replaced(run_ranks):
    with pytest.raises(RuntimeError, match="rank 0 of 2 died with exit code 3"):
        run_ranks(2)(die_on, 0)
    assert run_ranks(2)(total, Case(1.0)) == [Case(3.0)] * 2


def test_a_case_may_destroy_the_process_group(run_ranks):
    run_ranks(2)(leave_groups)
    assert run_ranks(2)(total, Case(1.0)) == [Case(3.0)] * 2


def test_results_that_cannot_be_pickled_are_reported(run_ranks):
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        run_ranks(2)(unpicklable)


def test_unwritten_memory_is_poison(run_ranks):
    assert torch.empty(4).isnan().all()
    assert run_ranks(2)(empty_is_nan) == [True, True]
