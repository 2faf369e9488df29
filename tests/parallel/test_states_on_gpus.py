"""Gated linear attention by states over NCCL: ZeCO in one block and in several, on a stream of its own, both ways."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ops import documents
from ops.gla import reference
from parallel.mesh import device
from parallel.sequence import states, zeco
from sequence_case import check_close, differentiate, layouts, on_shards
from test_states import EXCHANGES, TOLERANCE, whole_row

RANKS = [pytest.param(number, marks=pytest.mark.multigpu(number)) for number in (2, 4)]
TIMEOUT_S = 150.0  # kernels compile
SHARD_TOKENS = 150
WAYS = {
    (name, overlap): partial(states.gla, exchange=exchange, overlap=overlap)
    for name, exchange in EXCHANGES.items()
    for overlap in (False, True)
}
FOR_KERNELS = dict(heads=(6, 2), sizes=(64, 64))
LARGE_STATE = (32, 128, 256)
"""4 MiB, which zeco cuts by itself."""
NUM_PASSES, WARM = 50, 10


def in_all_ways(rank: int, inputs: list[Tensor], grad: Tensor, rows: list[list[int]]) -> dict[tuple, list]:
    """For each way and row [output, gradients] of this rank's shard, on its GPU."""
    *inputs, grad = (x.to(device()) for x in (*inputs, grad))
    return {
        way: [[x.cpu() for x in tensors] for tensors, _ in on_shards(rank, mix, inputs, grad, rows)]
        for way, mix in WAYS.items()
    }


def on_gpus(run_ranks, num_ranks: int):
    return run_ranks(num_ranks, backend="nccl", timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_n_gpus_equal_one_rank(run_ranks, num_ranks):
    """In fp32, against the reference in float64."""
    inputs, grad = whole_row(num_ranks * SHARD_TOKENS, torch.float64, heads=(4, 2), sizes=(8, 8))
    rows = layouts(num_ranks, shard_tokens=SHARD_TOKENS, num_random=2)
    results = on_gpus(run_ranks, num_ranks)(in_all_ways, [x.float() for x in inputs], grad.float(), rows)
    for index, edges in enumerate(rows):
        cu_seqlens = torch.tensor(edges, dtype=torch.int32)
        mix = lambda *x, cu_seqlens=cu_seqlens: reference.gla(*x, cu_seqlens=cu_seqlens)[0]  # noqa: E731
        expected = [x.float() for x in differentiate(mix, inputs, grad)[0]]
        for way in WAYS:
            found = [torch.cat(parts, dim=1) for parts in zip(*(result[way][index] for result in results))]
            check_close(found, expected, 10 * TOLERANCE[torch.float32], (way, edges))


@pytest.mark.parametrize("num_ranks", RANKS)
def test_blocks_give_the_bits_of_one_gather(run_ranks, num_ranks):
    """In bf16, where the kernels run and the side stream has something to run beside: nothing is read too early."""
    inputs, grad = whole_row(num_ranks * SHARD_TOKENS, torch.float32, **FOR_KERNELS)
    *inputs, log_decay = inputs
    inputs = [*(x.bfloat16() for x in inputs), log_decay]
    rows = layouts(num_ranks, shard_tokens=SHARD_TOKENS, num_random=2)
    for rank, result in enumerate(on_gpus(run_ranks, num_ranks)(in_all_ways, inputs, grad.bfloat16(), rows)):
        for (name, overlap), found in result.items():
            for edges, ours, theirs in zip(rows, found, result["lasp2", overlap], strict=True):
                equal = [torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)]
                assert all(equal), (name, overlap, rank, edges)


def entering_bits(rank: int, reverse: bool) -> tuple[bool, list[bool]]:
    """Whether anything enters this rank, and whether every exchange gives the bits of the first."""
    place, generator = device(), torch.Generator().manual_seed(rank)
    state = torch.randn(LARGE_STATE, generator=generator).to(place)
    decay = -torch.rand(LARGE_STATE[:2], generator=generator).to(place)
    first, *others = (
        exchange(state, decay, group=dist.group.WORLD, reverse=reverse)() for exchange in EXCHANGES.values()
    )
    return bool(first.any()), [torch.equal(first, other) for other in others]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_large_state_arrives_in_blocks(run_ranks, num_ranks, reverse):
    assert zeco.blocks_of(torch.empty(LARGE_STATE)) == 4
    for rank, (any_enters, equal) in enumerate(on_gpus(run_ranks, num_ranks)(entering_bits, reverse)):
        assert any_enters == (rank < num_ranks - 1 if reverse else rank > 0)
        assert all(equal), (rank, equal)


def memory_of_passes(rank: int, inputs: list[Tensor], grad: Tensor, way: tuple) -> list[tuple[int, int]]:
    """Bytes allocated and reserved after WARM and after NUM_PASSES passes that nobody waits for in between."""
    group, found = dist.group.WORLD, []
    *inputs, grad = (x.to(device()).chunk(group.size(), dim=1)[rank] for x in (*inputs, grad))
    whole = torch.tensor([0, grad.shape[1] * group.size()], dtype=torch.int32)
    cu_seqlens = documents.to_device(whole, grad.device)
    for number in range(1, NUM_PASSES + 1):
        leaves = [x.clone().requires_grad_() for x in inputs]
        WAYS[way](*leaves, cu_seqlens=cu_seqlens, group=group).backward(grad)
        if number in (WARM, NUM_PASSES):
            torch.cuda.synchronize()
            gc.collect()
            found.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    return found


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_many_passes_neither_hang_nor_hold_memory(run_ranks, num_ranks, overlap):
    inputs, grad = whole_row(num_ranks * SHARD_TOKENS, torch.float32, **FOR_KERNELS)
    way = ("zeco in 3 blocks", overlap)
    for (early, early_reserved), (late, late_reserved) in on_gpus(run_ranks, num_ranks)(
        memory_of_passes, inputs, grad, way
    ):
        assert late == early and late_reserved <= 2 * early_reserved
