"""Halo exchange: n ranks equal 1 rank with documents cut anywhere, and what the exchange carries."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import ops
from parallel.sequence import halo
from sequence_case import check_close, differentiate, layouts, on_shards

NUM_HEADS, NUM_KV_HEADS, KEY, VALUE = 6, 3, 4, 5
SHARD_TOKENS = 6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def whole_row(num_tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v, and the output's gradient."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((NUM_HEADS, KEY), (NUM_KV_HEADS, KEY), (NUM_KV_HEADS, VALUE), (NUM_HEADS, VALUE))
    *inputs, grad = (torch.randn(1, num_tokens, *shape, generator=generator, dtype=dtype) for shape in shapes)
    return inputs, grad


def fetched_tokens(edges: list[int], window: int, num_ranks: int) -> list[list[int]]:
    """For each rank the tokens left of its shard that one of its queries sees, by looking at every pair."""
    document = [sum(edge <= token for edge in edges) for token in range(edges[-1])]
    fetched = []
    for start in range(0, edges[-1], SHARD_TOKENS):
        queries = range(start, start + SHARD_TOKENS)
        seen = [[document[j] == document[i] and i - j < window for i in queries] for j in range(start)]
        fetched.append([j for j in range(start) if any(seen[j])])
    return fetched


@pytest.mark.parametrize("window", [1, 2, 5, SHARD_TOKENS + 1, 2 * SHARD_TOKENS + 3])
@pytest.mark.parametrize(
    "num_ranks, dtype", [(2, torch.float64), (3, torch.float64), (4, torch.float32), (8, torch.float64)]
)
def test_n_ranks_equal_one_rank(run_ranks, num_ranks, window, dtype):
    inputs, grad = whole_row(num_ranks * SHARD_TOKENS, dtype)
    rows = layouts(num_ranks, shard_tokens=SHARD_TOKENS, num_random=10 if num_ranks < 8 else 2)
    results = run_ranks(num_ranks)(on_shards, partial(halo.attention, window=window), inputs, grad, rows)
    for index, edges in enumerate(rows):
        cu_seqlens = torch.tensor(edges, dtype=torch.int32)
        attention = partial(ops.attention, window=window, cu_seqlens=cu_seqlens)
        expected, _ = differentiate(attention, inputs, grad)
        shards = [result[index][0] for result in results]
        check_close([torch.cat(parts, dim=1) for parts in zip(*shards)], expected, TOLERANCE[dtype], edges)
        _check_volume([result[index][1] for result in results], fetched_tokens(edges, window, num_ranks), window)


def _check_volume(calls: list, fetched: list[list[int]], window: int) -> None:
    size = NUM_KV_HEADS * (KEY + VALUE)
    for rank, (forward, backward) in enumerate(calls):
        own = range(rank * SHARD_TOKENS, (rank + 1) * SHARD_TOKENS)
        returned = sum(token in own for tokens in fetched for token in tokens)
        assert len(fetched[rank]) <= window - 1
        assert forward == [("all_to_all", size * len(fetched[rank]))]
        assert backward == [("all_to_all", size * returned)]
