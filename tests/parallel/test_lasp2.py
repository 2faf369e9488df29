"""LASP-2: n ranks equal 1 rank with documents cut anywhere, and what the all-gathers carry."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import ops
from parallel.sequence import lasp2
from sequence_case import check_close, differentiate, layouts, on_shards

NUM_HEADS, NUM_KV_HEADS, KEY, VALUE = 6, 3, 4, 5
SHARD_TOKENS = 7
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def whole_row(num_tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v, log_decay, and the output's gradient."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((NUM_HEADS, KEY), (NUM_KV_HEADS, KEY), (NUM_KV_HEADS, VALUE), (NUM_KV_HEADS, KEY), (NUM_HEADS, VALUE))
    *inputs, log_decay, grad = (
        torch.randn(1, num_tokens, *shape, generator=generator, dtype=dtype) for shape in shapes
    )
    return [*inputs, torch.nn.functional.logsigmoid(log_decay) / 4], grad


def on_one_rank(edges: list[int], *inputs: Tensor) -> Tensor:
    return ops.gla(*inputs, cu_seqlens=torch.tensor(edges, dtype=torch.int32))[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_n_ranks_equal_one_rank(run_ranks, num_ranks, dtype):
    inputs, grad = whole_row(num_ranks * SHARD_TOKENS, dtype)
    rows = layouts(num_ranks, shard_tokens=SHARD_TOKENS)
    results = run_ranks(num_ranks)(on_shards, lasp2.gla, inputs, grad, rows)
    for index, edges in enumerate(rows):
        expected, _ = differentiate(partial(on_one_rank, edges), inputs, grad)
        shards = [result[index][0] for result in results]
        check_close([torch.cat(parts, dim=1) for parts in zip(*shards)], expected, TOLERANCE[dtype], edges)
        received = (num_ranks - 1) * NUM_KV_HEADS * (KEY * VALUE + KEY)
        for result in results:
            assert result[index][1] == [[("all_gather", received)]] * 2, "one all-gather a pass, whatever the documents"


def test_strong_decay_over_many_ranks_is_finite(run_ranks):
    inputs, grad = whole_row(4 * SHARD_TOKENS, torch.float32)
    inputs[3] = inputs[3] * 40
    results = run_ranks(4)(on_shards, lasp2.gla, inputs, grad, [[0, 4 * SHARD_TOKENS]])
    expected, _ = differentiate(partial(on_one_rank, [0, 4 * SHARD_TOKENS]), inputs, grad)
    shards = [result[0][0] for result in results]
    check_close([torch.cat(parts, dim=1) for parts in zip(*shards)], expected, 5e-5, "strong decay")
