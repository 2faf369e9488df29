"""The gated delta rule over shards: n ranks equal 1 rank, whatever the heads, and what the all-to-alls carry."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import ops
from parallel.sequence.delta_rule import gated_delta_rule, head_plans
from sequence_case import check_close, differentiate, layouts, on_shards

KEY, VALUE, SHARD_TOKENS = 4, 5, 6
HEADS = {"grouped values": (2, 2, 4), "grouped queries": (6, 3, 3), "one of all": (1, 1, 1), "shared keys": (3, 1, 3)}


def whole_row(heads: tuple[int, int, int], num_tokens: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v, log_decay, beta, and the output's gradient."""
    queries, keys, values = heads
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((queries, KEY), (keys, KEY), (values, VALUE), (values,), (values,), (max(heads), VALUE))
    q, k, v, log_decay, beta, grad = (
        torch.randn(1, num_tokens, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return [q, k, v, torch.nn.functional.logsigmoid(log_decay), beta.sigmoid()], grad


def on_one_rank(edges: list[int], *inputs: Tensor) -> Tensor:
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    return ops.gated_delta_rule(*inputs, cu_seqlens=cu_seqlens, qk_l2norm=True)[0]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_n_ranks_equal_one_rank(run_ranks, num_ranks, heads):
    sp_fits = num_ranks <= min(heads) or num_ranks % min(heads) == 0
    if not sp_fits:
        with pytest.raises(ValueError, match=f"layout.sp={num_ranks} does not fit .* choose an sp up to {min(heads)}"):
            head_plans(list(heads), sp=num_ranks)
        return
    inputs, grad = whole_row(heads, num_ranks * SHARD_TOKENS)
    rows = layouts(num_ranks, shard_tokens=SHARD_TOKENS, num_random=3)
    results = run_ranks(num_ranks)(on_shards, partial(gated_delta_rule, qk_l2norm=True), inputs, grad, rows)
    q_heads, k_heads, v_heads = map(len, head_plans(list(heads), sp=num_ranks))
    sizes = [q_heads * KEY, k_heads * KEY, v_heads * VALUE, v_heads, v_heads, max(q_heads, v_heads) * VALUE]
    received = sorted(SHARD_TOKENS * size * (num_ranks - 1) // num_ranks for size in sizes)
    for index, edges in enumerate(rows):
        expected, _ = differentiate(partial(on_one_rank, edges), inputs, grad)
        shards = [result[index][0] for result in results]
        check_close([torch.cat(parts, dim=1) for parts in zip(*shards)], expected, 1e-12, edges)
        for result in results:
            for calls in result[index][1]:
                assert sorted(elements for _, elements in calls) == received


def test_units_stay_together():
    assert head_plans([2, 2, 4], sp=2) == [[0, 1], [0, 1], [0, 1, 2, 3]]
    assert head_plans([3, 3, 6], sp=2) == [[0, 1, 2, -1], [0, 1, 2, -1], [0, 1, 2, 3, 4, 5, -1, -1]]
    assert head_plans([28, 4, 4], sp=8) == [
        [7 * unit + i if i < 7 else -1 for unit in range(4) for i in range(8)],
        *[[0, 0, 1, 1, 2, 2, 3, 3]] * 2,
    ]
    with pytest.raises(ValueError, match="layout.sp=12 does not fit"):
        head_plans([4, 8, 16], sp=12)
