"""Every pair that THE TABLE allows: n ranks equal 1 rank in fp32 with documents cut anywhere, its collectives carry
what the docstrings say, and a rank that waits in them can say in what."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ops
from parallel.layout import SequenceAlgorithm, SequenceAlgorithms
from parallel.sequence.choose import choose
from parallel.sequence.table import TABLE, candidates, mixing
from parallel.sequence.ulysses import head_plan
from sequence_case import check_close, counted, differentiate, layouts, named, on_shards

NUM_HEADS, NUM_KV_HEADS, KEY, VALUE, WINDOW = 12, 4, 4, 6, 9
SHARD_TOKENS = 6
PAIRS = [(symbol, algorithm.name) for symbol in TABLE for algorithm in candidates(symbol)]
NAMES = {
    "ulysses": "ulysses all-to-all",
    "halo": "halo all-to-all",
    "lasp2": "lasp2 all-gather",
    "zeco": "zeco all-scan",
}


def mix(symbol: str, algorithm: str, *inputs: Tensor, group, **how):
    """The pair's op over the ranks of a group; by lasp2 and by zeco as on one host."""
    window = WINDOW if symbol == "S" else None
    sizes = dict(num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, window=window, group=group)
    return mixing(symbol, SequenceAlgorithm[algorithm], **sizes)(*inputs, **how)


def on_one_rank(symbol: str, *inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
    if symbol == "L":
        return ops.gla(*inputs, cu_seqlens=cu_seqlens)[0]
    return ops.attention(*inputs, window=WINDOW if symbol == "S" else None, cu_seqlens=cu_seqlens)


def whole_row(symbol: str, num_tokens: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v, of L the decays, and the output's gradient."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((NUM_HEADS, KEY), (NUM_KV_HEADS, KEY), (NUM_KV_HEADS, VALUE), (NUM_KV_HEADS, KEY), (NUM_HEADS, VALUE))
    *inputs, log_decay, grad = (torch.randn(1, num_tokens, *shape, generator=generator) for shape in shapes)
    decays = [torch.nn.functional.logsigmoid(log_decay) / 4] if symbol == "L" else []
    return [*inputs, *decays], grad


def received(symbol: str, algorithm: str, rank: int, sp: int) -> list[list[tuple[str, int]]]:
    """What the docstrings promise of a forward and a backward pass; of a halo the most."""
    if algorithm == "lasp2":
        return [[("all_gather", (sp - 1) * NUM_KV_HEADS * (KEY * VALUE + KEY))]] * 2
    if algorithm == "zeco":
        sent = [("sent", NUM_KV_HEADS * KEY * VALUE)]
        return [sent if rank < sp - 1 else [], sent if rank > 0 else []]
    if algorithm == "halo":
        return [[("all_to_all", (WINDOW - 1) * NUM_KV_HEADS * (KEY + VALUE))]] * 2
    q, kv = map(len, head_plan(num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, sp=sp))
    sizes = [q * KEY, q * VALUE, kv * KEY, kv * VALUE, *([kv * KEY] if symbol == "L" else [])]
    return [sorted(("all_to_all", SHARD_TOKENS * size * (sp - 1) // sp) for size in sizes)] * 2


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(("symbol", "algorithm"), PAIRS)
def test_n_ranks_equal_one_rank(run_ranks, symbol, algorithm, num_ranks):
    inputs, grad = whole_row(symbol, num_ranks * SHARD_TOKENS)
    rows = layouts(num_ranks, shard_tokens=SHARD_TOKENS, num_random=6 if num_ranks < 8 else 2, seed=1)
    results = run_ranks(num_ranks)(on_shards, partial(mix, symbol, algorithm), inputs, grad, rows)
    for index, edges in enumerate(rows):
        cu_seqlens = torch.tensor(edges, dtype=torch.int32)
        expected, _ = differentiate(partial(on_one_rank, symbol, cu_seqlens=cu_seqlens), inputs, grad)
        found = [torch.cat(parts, dim=1) for parts in zip(*(result[index][0] for result in results))]
        check_close(found, expected, 1e-5, edges)
        for rank, result in enumerate(results):
            promised = received(symbol, algorithm, rank, num_ranks)
            carried = [sorted(calls) for calls in result[index][1]]
            if algorithm == "halo":  # to the element in test_halo.py
                ((name, elements),), ((_, most),) = carried[0], promised[0]
                assert name == "all_to_all" and elements <= most
            else:
                assert carried == promised


def chosen_and_received(rank: int, inputs: list[Tensor], grad: Tensor) -> tuple[str, list[tuple[str, int]]]:
    """What auto says of S, and the forward pass's collectives by halo and by ulysses; a row of one document."""
    group, num_tokens = dist.group.WORLD, grad.shape[1]
    sizes = dict(num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=KEY, window=WINDOW)
    about = dict(seq_len=num_tokens, row_tokens=num_tokens, group=group, device=grad.device)
    _, reasons = choose(SequenceAlgorithms(), {"S"}, **sizes, **about)
    calls = []
    for algorithm in ("halo", "ulysses"):
        ((_, (forward, _)),) = on_shards(rank, partial(mix, "S", algorithm), inputs, grad, [[0, num_tokens]])
        calls.append(sum(elements for _, elements in forward))
    return reasons["S"], calls


def test_auto_counts_what_the_calls_carry(run_ranks):
    """The last rank has a whole window on its left."""
    inputs, grad = whole_row("S", 4 * SHARD_TOKENS)
    inputs[2], grad = inputs[2][..., :KEY].contiguous(), grad[..., :KEY].contiguous()
    reason, (halo, ulysses) = run_ranks(4)(chosen_and_received, inputs, grad)[-1]
    assert reason == f"halo (receives {halo:,} elements a layer, ulysses {ulysses:,})"


def names_of(rank: int, symbol: str, algorithm: str, inputs: list[Tensor], grad: Tensor) -> set[str]:
    names = set()
    with named(names):
        on_shards(rank, partial(mix, symbol, algorithm), inputs, grad, [[0, grad.shape[1]]])
    return names


@pytest.mark.parametrize(("symbol", "algorithm"), PAIRS)
def test_a_rank_that_waits_can_say_in_what(run_ranks, symbol, algorithm):
    inputs, grad = whole_row(symbol, 3 * SHARD_TOKENS)
    assert run_ranks(3)(names_of, symbol, algorithm, inputs, grad) == [{NAMES[algorithm]}] * 3


def leave(rank: int, algorithm: str, inputs: list[Tensor]) -> tuple[Tensor, list[tuple[str, int]]]:
    """The state after the row, on this rank, and what it took beyond the pass itself."""
    group, calls, plain = dist.group.WORLD, [], []
    shards = [x.chunk(group.size(), dim=1)[rank] for x in inputs]
    cu_seqlens = torch.tensor([0, inputs[0].shape[1]], dtype=torch.int32)
    with counted(plain):
        mix("L", algorithm, *shards, cu_seqlens=cu_seqlens, group=group)
    with counted(calls):
        _, state = mix("L", algorithm, *shards, cu_seqlens=cu_seqlens, group=group, return_state=True)
    return state, calls[len(plain) :]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("algorithm", [name for symbol, name in PAIRS if symbol == "L"])
def test_the_state_that_decoding_starts_from_is_on_every_rank(run_ranks, algorithm, num_ranks):
    inputs, _ = whole_row("L", num_ranks * SHARD_TOKENS)
    _, expected = ops.gla(*inputs, output_final_state=True)
    size = KEY * VALUE
    own_heads = len(head_plan(num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, sp=num_ranks)[1]) // num_ranks
    for rank, (state, more) in enumerate(run_ranks(num_ranks)(leave, algorithm, inputs)):
        check_close([state], [expected], 1e-5, rank)
        if algorithm == "ulysses":
            assert more == [("all_gather", (num_ranks - 1) * own_heads * size)]
        else:
            assert more == [("broadcast", NUM_KV_HEADS * size if rank < num_ranks - 1 else 0)]
