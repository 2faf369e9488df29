"""Gated linear attention by states, LASP-2 and ZeCO: n ranks equal 1 rank with documents cut anywhere, and what the
exchanges carry."""

from __future__ import annotations

import os
import random
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ops
from parallel.sequence import lasp2, states, zeco
from sequence_case import check_close, differentiate, layouts, on_shards

NUM_HEADS, NUM_KV_HEADS, KEY, VALUE = 6, 3, 4, 5
SHARD_TOKENS = 7
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
EXCHANGES = {
    "lasp2": lasp2.exchange,
    "zeco": zeco.exchange,
    "zeco in 2 blocks": partial(zeco.exchange, num_blocks=2),
    "zeco in 3 blocks": partial(zeco.exchange, num_blocks=3),  # of 2, 2 and 0 channels
}


def whole_row(
    num_tokens: int,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (NUM_HEADS, NUM_KV_HEADS),
    sizes: tuple[int, int] = (KEY, VALUE),
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, log_decay, and the output's gradient."""
    generator = torch.Generator().manual_seed(num_tokens)
    (query, shared), (key, value) = heads, sizes
    shapes = ((query, key), (shared, key), (shared, value), (shared, key), (query, value))
    *inputs, log_decay, grad = (
        torch.randn(1, num_tokens, *shape, generator=generator, dtype=dtype) for shape in shapes
    )
    return [*inputs, torch.nn.functional.logsigmoid(log_decay) / 4], grad


def on_one_rank(edges: list[int], *inputs: Tensor) -> Tensor:
    return ops.gla(*inputs, cu_seqlens=torch.tensor(edges, dtype=torch.int32))[0]


def volume(exchange: str, rank: int, num_ranks: int) -> list[list[tuple[str, int]]]:
    """What the docstrings promise of the collectives of a forward and a backward pass."""
    if exchange == "lasp2":
        return [[("all_gather", (num_ranks - 1) * NUM_KV_HEADS * (KEY * VALUE + KEY))]] * 2
    sent = [("sent", NUM_KV_HEADS * KEY * VALUE)]
    return [sent if rank < num_ranks - 1 else [], sent if rank > 0 else []]


def summed(calls: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The blocks of a state together."""
    total = sum(elements for name, elements in calls if name == "sent")
    return [call for call in calls if call[0] != "sent"] + ([("sent", total)] if total else [])


@pytest.mark.parametrize(
    "num_ranks, dtype", [(2, torch.float64), (3, torch.float64), (4, torch.float32), (8, torch.float64)]
)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_n_ranks_equal_one_rank(run_ranks, num_ranks, exchange, overlap, dtype):
    inputs, grad = whole_row(num_ranks * SHARD_TOKENS, dtype)
    rows = layouts(num_ranks, shard_tokens=SHARD_TOKENS, num_random=5 if num_ranks < 8 else 2)
    mix = partial(states.gla, exchange=EXCHANGES[exchange], overlap=overlap)
    results = run_ranks(num_ranks)(on_shards, mix, inputs, grad, rows)
    for index, edges in enumerate(rows):
        expected, _ = differentiate(partial(on_one_rank, edges), inputs, grad)
        shards = [result[index][0] for result in results]
        check_close([torch.cat(parts, dim=1) for parts in zip(*shards)], expected, TOLERANCE[dtype], edges)
        for rank, result in enumerate(results):
            carried = [summed(calls) for calls in result[index][1]]
            assert carried == volume(exchange, rank, num_ranks), "the same calls, whatever the documents"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_strong_decay_over_many_ranks_is_finite(run_ranks, exchange, overlap):
    inputs, grad = whole_row(4 * SHARD_TOKENS, torch.float32)
    inputs[3] = inputs[3] * 40
    mix = partial(states.gla, exchange=EXCHANGES[exchange], overlap=overlap)
    results = run_ranks(4)(on_shards, mix, inputs, grad, [[0, 4 * SHARD_TOKENS]])
    expected, _ = differentiate(partial(on_one_rank, [0, 4 * SHARD_TOKENS]), inputs, grad)
    shards = [result[0][0] for result in results]
    check_close([torch.cat(parts, dim=1) for parts in zip(*shards)], expected, 5e-5, "strong decay")


class MiddleOfThree:
    """The rank in the middle of a group of three, for exchanges that ask no more of a group."""

    def size(self) -> int:
        return 3

    def rank(self) -> int:
        return 1


class Logged(torch.autograd.Function):
    """Says when the work behind a tensor is done in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, log: list[str], name: str) -> Tensor:
        ctx.log, ctx.name = log, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.log.append(ctx.name)
        return grad, None, None


def order_of_work(overlap: bool) -> tuple[list[str], list[str]]:
    """What one rank does in its forward and in its backward pass: its ops, and when states leave and arrive."""
    log, backward = [], []

    def exchange(state: Tensor, decay: Tensor, *, group, reverse: bool):
        (backward if reverse else log).append("leaves")

        def wait() -> Tensor:
            (backward if reverse else log).append("arrives")
            return torch.ones_like(state)

        return wait

    def logged(name: str):
        call = getattr(ops, name)

        def op(*tensors, **options):
            log.append(name)
            found = call(*tensors, **options)
            o = Logged.apply(found[0] if isinstance(found, tuple) else found, backward, name)
            return (o, *found[1:]) if isinstance(found, tuple) else o

        return op

    inputs, grad = whole_row(SHARD_TOKENS, torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    whole = torch.tensor([0, 3 * SHARD_TOKENS], dtype=torch.int32)
    names = ("gla", "gla_state", "gla_output", "gla_carry")
    with patch.multiple(ops, **{name: logged(name) for name in names}):
        o = states.gla(*leaves, cu_seqlens=whole, group=MiddleOfThree(), exchange=exchange, overlap=overlap)
    o.backward(grad)
    return log, backward


def test_a_shards_own_work_is_done_while_its_state_travels():
    """Forward and backward: all that needs no state comes between a state's leaving and the wait for the other."""
    forward, backward = order_of_work(overlap=True)
    assert forward == ["gla_state", "leaves", "gla", "arrives", "gla_carry"]
    assert backward == ["gla_carry", "leaves", "gla", "arrives", "gla_state"]


def test_inside_a_host_a_rank_waits_and_computes_all_at_once():
    forward, backward = order_of_work(overlap=False)
    assert forward == ["gla_state", "leaves", "arrives", "gla_output"]
    assert backward == ["gla_output", "leaves", "arrives", "gla_state"]


def entering(rank: int, seed: int, reverse: bool) -> list[Tensor]:
    """The state that enters this rank, by every exchange."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    state = torch.randn(NUM_KV_HEADS, KEY, VALUE, generator=generator)
    decay = -torch.rand(NUM_KV_HEADS, KEY, generator=generator) * random.Random(seed).choice([0.01, 1, 100])
    return [exchange(state, decay, group=dist.group.WORLD, reverse=reverse)() for exchange in EXCHANGES.values()]


@pytest.mark.parametrize("reverse", [False, True])
def test_all_exchanges_give_the_same_bits(run_ranks, reverse):
    """A run may go on with another one."""
    for seed in range(3):
        for rank, (first, *others) in enumerate(run_ranks(4)(entering, seed, reverse)):
            assert bool(first.any()) == (rank < 3 if reverse else rank > 0)
            assert all(torch.equal(first, other) for other in others)


def spanning(rank: int, key: str, text: str) -> list[bool]:
    pair, whole = dist.new_group([0, 1]), dist.group.WORLD
    with patch.dict(os.environ, **{key: text}):
        if key != "LOCAL_WORLD_SIZE":
            os.environ.pop("LOCAL_WORLD_SIZE", None)
        found = [states.spans_hosts(group) for group in (pair, whole) if rank in dist.get_process_group_ranks(group)]
    if rank < 2:
        dist.destroy_process_group(pair)
    return found


def test_only_groups_over_several_hosts_overlap_by_themselves(run_ranks):
    torchrun, srun = "LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"
    for key, text in ((torchrun, "2"), (srun, "2(x2)")):
        assert run_ranks(4)(spanning, key, text) == [[False, True], [False, True], [True], [True]]
    for key, text in ((torchrun, "4"), (srun, "4"), (srun, "")):
        assert run_ranks(4)(spanning, key, text) == [[False, False], [False, False], [False], [False]]


def test_a_large_state_is_cut_into_blocks():
    assert zeco.blocks_of(torch.empty(4, 128, 128)) == 1
    assert zeco.blocks_of(torch.empty(32, 128, 256)) == 4
    assert zeco.blocks_of(torch.empty(4096, 8, 256)) == 8
