"""The end of a row: every keeper gets its last tokens, the others none, and only what is kept travels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.sequence.tail import tail
from sequence_case import counted

SHARD_TOKENS, SIZE = 5, 6


def on_shards(rank: int, row: Tensor, cases: list[tuple[int | None, range]]) -> list[tuple[Tensor, list]]:
    """The tail that this rank gets for each case, and its collectives."""
    group, found = dist.group.WORLD, []
    shard = row.chunk(group.size(), dim=1)[rank]
    for num_tokens, keepers in cases:
        calls = []
        with counted(calls):
            found.append((tail(shard, num_tokens, keepers=keepers, group=group), calls))
    return found


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_keepers_get_the_end_of_the_row(run_ranks, num_ranks):
    total = num_ranks * SHARD_TOKENS
    row = torch.randn(1, total, 2, SIZE // 2)
    numbers = [0, 1, SHARD_TOKENS - 1, SHARD_TOKENS, SHARD_TOKENS + 2, total - 1, total, total + 3, None]
    choices = [range(num_ranks), *(range(rank, rank + 1) for rank in range(num_ranks))]
    cases = [(number, keepers) for number in numbers for keepers in choices]
    results = run_ranks(num_ranks)(on_shards, row, cases)
    for index, (number, keepers) in enumerate(cases):
        kept = total if number is None else min(number, total)
        for rank in range(num_ranks):
            found, calls = results[rank][index]
            expected = row[:, total - kept :] if rank in keepers else row[:, :0]
            assert torch.equal(found, expected), (number, keepers, rank)
            own = min(SHARD_TOKENS, max(0, kept - (num_ranks - 1 - rank) * SHARD_TOKENS))
            assert calls == [("all_to_all", (kept - own) * SIZE if rank in keepers else 0)], (number, keepers, rank)
