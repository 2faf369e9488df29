"""What meta tokens leave for every document, over shards: n ranks equal 1 rank, and nothing more travels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ops
from parallel.layout import SequenceAlgorithm
from parallel.sequence import lasp2, states, zeco
from parallel.sequence.table import mixing
from sequence_case import check_close, differentiate, layouts

KEY, VALUE, NUM_META, WINDOW = 4, 5, 3, 9
SHARD_TOKENS = 7
TOLERANCE = 1e-12


def whole_row(symbol: str, num_tokens: int, heads: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of the row q, k, v and L's log_decay; what every rank has; the output's gradient. All float64."""
    generator = torch.Generator().manual_seed(num_tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_heads, num_kv_heads = heads
    q, k = random(1, num_tokens, num_heads, KEY), random(1, num_tokens, num_kv_heads, KEY)
    v, grad = random(1, num_tokens, num_kv_heads, VALUE), random(1, num_tokens, num_heads, VALUE)
    if symbol == "L":
        decay = torch.nn.functional.logsigmoid(random(*k.shape)) / 4
        return [q, k, v, decay], [random(num_kv_heads, KEY, VALUE)], grad
    return [q, k, v], [random(NUM_META, num_kv_heads, KEY), random(NUM_META, num_kv_heads, VALUE)], grad


def named(symbol: str, shared: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("initial_state",) if symbol == "L" else ("sink_k", "sink_v"), shared, strict=True))


def on_one_rank(symbol: str, edges: list[int], *inputs: Tensor) -> Tensor:
    cu_seqlens, num = torch.tensor(edges, dtype=torch.int32), 4 if symbol == "L" else 3
    if symbol == "L":
        first = inputs[num].expand(len(edges) - 1, -1, -1, -1)
        return ops.gla(*inputs[:num], initial_state=first, cu_seqlens=cu_seqlens)[0]
    window = WINDOW if symbol == "S" else None
    return ops.attention(*inputs[:num], window=window, cu_seqlens=cu_seqlens, **named(symbol, inputs[num:]))


def mix_of(symbol: str, algorithm: str, heads: tuple[int, int], group):
    """Also the ways that no layout asks for on one host."""
    if algorithm.endswith("overlap"):
        exchange = {"lasp2 overlap": lasp2.exchange, "zeco overlap": zeco.exchange}[algorithm]
        return partial(states.gla, group=group, exchange=exchange, overlap=True)
    about = dict(num_heads=heads[0], num_kv_heads=heads[1], window=WINDOW if symbol == "S" else None)
    return mixing(symbol, SequenceAlgorithm[algorithm], **about, group=group)


def on_shards(rank: int, symbol: str, algorithm: str, heads: tuple[int, int], rows: list[list[int]]) -> list:
    """For each row [output, gradients of this rank's shards and of its copies], and what travels, without and with."""
    group = dist.group.WORLD
    inputs, shared, grad = whole_row(symbol, rows[0][-1], heads)
    *inputs, grad = (x.chunk(group.size(), dim=1)[rank] for x in (*inputs, grad))
    mix, found = mix_of(symbol, algorithm, heads, group), []
    for edges in rows:
        cu_seqlens = torch.tensor(edges, dtype=torch.int32)

        def with_meta(*tensors: Tensor, cu_seqlens=cu_seqlens) -> Tensor:
            own, copies = tensors[: len(inputs)], tensors[len(inputs) :]
            return mix(*own, cu_seqlens=cu_seqlens, **named(symbol, copies))

        _, usual = differentiate(partial(mix, cu_seqlens=cu_seqlens), inputs, grad)
        found.append((*differentiate(with_meta, [*inputs, *shared], grad), usual))
    return found


CASES = [
    *[("L", name, (6, 3)) for name in ("lasp2", "zeco", "lasp2 overlap", "zeco overlap")],
    ("L", "ulysses", (6, 3)),
    ("L", "ulysses", (4, 1)),
    ("S", "halo", (6, 3)),
    ("S", "ulysses", (6, 3)),
    ("F", "ulysses", (6, 3)),
    ("F", "ulysses", (4, 1)),
]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("symbol", "algorithm", "heads"), CASES)
def test_n_ranks_equal_one_rank(run_ranks, symbol, algorithm, heads, num_ranks):
    if algorithm == "ulysses" and num_ranks > heads[1] > 1:
        heads = (12, 6)  # 3 do not go on 4 ranks; these go with heads of zeros
    rows = layouts(num_ranks, shard_tokens=SHARD_TOKENS, num_random=6)
    results = run_ranks(num_ranks)(on_shards, symbol, algorithm, heads, rows)
    inputs, shared, grad = whole_row(symbol, rows[0][-1], heads)
    for index, edges in enumerate(rows):
        expected, _ = differentiate(partial(on_one_rank, symbol, edges), [*inputs, *shared], grad)
        found = [result[index][0] for result in results]
        shards, copies = ([tensors[part] for tensors in found] for part in _parts(len(inputs)))
        whole = [torch.cat(parts, dim=1) for parts in zip(*shards)] + [sum(parts) for parts in zip(*copies)]
        check_close(whole, expected, TOLERANCE, edges)
        assert all(result[index][1] == result[index][2] for result in results), "what travels is what it was"


def _parts(num_inputs: int) -> tuple[slice, slice]:
    """Of a rank's tensors: output and gradients of shards, gradients of copies."""
    return slice(1 + num_inputs), slice(1 + num_inputs, None)
