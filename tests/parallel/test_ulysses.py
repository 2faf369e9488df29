"""Ulysses: which heads travel where, and that gather and scatter are the slices they stand for, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.sequence.ulysses import Ulysses, head_plan

PLANS = [
    # Hq, Hkv, sp: q heads and kv heads that travel
    (9, 3, 2, 12, 4),  # the design's examples: SmolLM2 ...
    (28, 4, 8, 32, 8),  # ... and Qwen2.5-7B
    (28, 4, 2, 28, 4),
    (28, 4, 4, 28, 4),
    (9, 3, 3, 9, 3),
    (9, 3, 6, 12, 6),
    (5, 5, 4, 8, 8),
    (4, 1, 3, 6, 3),
    (1, 1, 4, 4, 4),
]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "sp", "num_q", "num_kv"), PLANS)
def test_head_plan(num_heads, num_kv_heads, sp, num_q, num_kv):
    q, kv = head_plan(num_heads=num_heads, num_kv_heads=num_kv_heads, sp=sp)
    assert (len(q), len(kv)) == (num_q, num_kv) and num_q % sp == num_kv % sp == 0
    assert sorted(head for head in q if head >= 0) == list(range(num_heads)), "every query head travels once"
    assert set(kv) - {-1} == set(range(num_kv_heads))
    group = num_heads // num_kv_heads
    for rank in range(sp):
        own_q = q[rank * num_q // sp : (rank + 1) * num_q // sp]
        own_kv = kv[rank * num_kv // sp : (rank + 1) * num_kv // sp]
        per_kv, rest = divmod(len(own_q), len(own_kv))
        assert rest == 0, "the rank's heads are grouped queries again"
        for slot, head in enumerate(own_q):
            assert head == -1 or own_kv[slot // per_kv] == head // group, "a query head meets its own kv head"


def test_head_plan_of_the_designs_examples():
    assert head_plan(num_heads=9, num_kv_heads=3, sp=2) == ([*range(9), -1, -1, -1], [0, 1, 2, -1])
    q, kv = head_plan(num_heads=28, num_kv_heads=4, sp=8)
    assert kv == [0, 0, 1, 1, 2, 2, 3, 3] and q[:8] == [0, 1, 2, 3, 4, 5, 6, -1]


@pytest.mark.parametrize(("num_kv_heads", "sp"), [(2, 3), (3, 4), (4, 6), (8, 12)])
def test_head_plan_refuses(num_kv_heads, sp):
    with pytest.raises(ValueError, match=rf"layout\.sp={sp}.* {num_kv_heads} key/value heads.*choose an sp"):
        head_plan(num_heads=2 * num_kv_heads, num_kv_heads=num_kv_heads, sp=sp)


def _mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Anything that joins q head h with kv head h // G over the whole sequence. [1,T,H,D] and v [1,T,Hkv,V]."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    return (q * k).sum(-1, keepdim=True).cumsum(1) * v


def _whole(num_heads: int, num_kv_heads: int, num_tokens: int) -> list[Tensor]:
    """q, k, v and what the output's gradient is, float64; v has a width of its own."""
    generator = torch.Generator().manual_seed(num_heads)
    shapes = ((num_heads, 4), (num_kv_heads, 4), (num_kv_heads, 3), (num_heads, 3))
    return [torch.randn(1, num_tokens, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _exchange(rank: int, num_heads: int, num_kv_heads: int, num_tokens: int) -> dict[str, Tensor]:
    """What one rank has after gather, after scatter, and in the gradients of its shard."""
    size, group = dist.get_world_size(), dist.group.WORLD
    part = slice(rank * num_tokens // size, (rank + 1) * num_tokens // size)
    *inputs, grad = (x[:, part].clone() for x in _whole(num_heads, num_kv_heads, num_tokens))
    for x in inputs:
        x.requires_grad_()
    ulysses = Ulysses(num_heads=num_heads, num_kv_heads=num_kv_heads, group=group)
    q, k, v = ulysses.gather(*inputs)
    o = ulysses.scatter(_mix(q, k, v))
    o.backward(grad)
    grads = {f"d{name}": x.grad for name, x in zip("qkv", inputs)}
    return {name: x.detach() for name, x in {"q": q, "k": k, "v": v, "o": o, **grads}.items()}


@pytest.mark.parametrize(
    ("num_ranks", "num_heads", "num_kv_heads"),
    [
        (1, 9, 3),
        (2, 4, 2),  # nothing to pad
        (2, 9, 3),  # a kv head of zeros
        (2, 6, 1),  # copies of the kv head
        (2, 7, 1),  # copies, and a query head of zeros
        (3, 8, 4),  # kv heads of zeros on one rank alone
        (3, 4, 1),
        (4, 14, 2),  # two ranks a kv head, one query head of zeros each
        (4, 10, 5),  # the last rank gets nothing but zeros
    ],
)
def test_gather_and_scatter_are_slices_of_the_whole(run_ranks, num_ranks, num_heads, num_kv_heads):
    num_tokens = 12
    results = run_ranks(num_ranks)(_exchange, num_heads, num_kv_heads, num_tokens)
    *inputs, grad = _whole(num_heads, num_kv_heads, num_tokens)
    for x in inputs:
        x.requires_grad_()
    output = _mix(*inputs)
    output.backward(grad)

    q_heads, kv_heads = head_plan(num_heads=num_heads, num_kv_heads=num_kv_heads, sp=num_ranks)
    for name, x, heads in zip("qkv", inputs, (q_heads, kv_heads, kv_heads)):
        gathered = torch.cat([result[name] for result in results], dim=2)
        assert gathered.shape[1:3] == (num_tokens, len(heads))
        for slot, head in enumerate(heads):
            expected = torch.zeros_like(gathered[:, :, slot]) if head < 0 else x[:, :, head]
            assert torch.equal(gathered[:, :, slot], expected), (name, slot)
        scattered = torch.cat([result[f"d{name}"] for result in results], dim=1)
        torch.testing.assert_close(scattered, x.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat([result["o"] for result in results], dim=1), output)
