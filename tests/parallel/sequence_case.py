"""Random packed rows cut into shards, and what a rank's collectives carried: for the sequence-parallel algorithms."""

from __future__ import annotations

import random
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from ops import documents
from parallel import place


def random_documents(draw: random.Random, *, num_tokens: int, num_ranks: int) -> list[int]:
    """cu_seqlens of a row: cuts anywhere, at and beside shard boundaries; empty and length-1 documents likely."""
    shard_tokens = num_tokens // num_ranks
    cuts = [draw.randrange(num_tokens + 1) for _ in range(draw.choice([0, 1, 2, 5, num_tokens]))]
    for boundary in range(0, num_tokens + 1, shard_tokens):
        cuts += [boundary + step for step in (-1, 0, 0, 1) if draw.random() < 0.15]
    cuts += [cut for cut in cuts if draw.random() < 0.2]
    return [0, *sorted(cut for cut in cuts if 0 <= cut <= num_tokens), num_tokens]


def layouts(num_ranks: int, *, shard_tokens: int, num_random: int = 10, seed: int = 0) -> list[list[int]]:
    """Documents of rows of num_ranks shards: the extremes, then random ones."""
    num_tokens, draw = num_ranks * shard_tokens, random.Random(100 * seed + num_ranks)
    every = [*range(0, num_tokens + 1, shard_tokens)]
    extremes = [
        [0, num_tokens],  # one document over all ranks
        every,  # nothing crosses
        [0, 0, *every, num_tokens],
        [*range(num_tokens + 1)],  # length 1 alone
        [0, shard_tokens - 1, num_tokens],
        [0, shard_tokens + 1, shard_tokens + 1, num_tokens],
    ]
    return extremes + [random_documents(draw, num_tokens=num_tokens, num_ranks=num_ranks) for _ in range(num_random)]


@contextmanager
def counted(calls: list):
    """Append (collective, elements received from other ranks) to calls for every collective of this process, and
    ("sent", elements) for what it sends to one rank."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, exchange, batch = getattr(dist, name), dist.all_to_all_single, dist.batch_isend_irecv
    cast = dist.broadcast

    def all_gather(output, x, group=None, async_op=False):
        calls.append(("all_gather", output.numel() - x.numel()))
        return gather(output, x, group=group, async_op=async_op)

    def batch_isend_irecv(transfers):
        calls.extend(("sent", transfer.tensor.numel()) for transfer in transfers if transfer.op is dist.isend)
        return batch(transfers)

    def all_to_all_single(output, x, received=None, sent=None, group=None):
        own = 1 / group.size() if received is None else received[group.rank()] / max(1, sum(received))
        calls.append(("all_to_all", round(output.numel() * (1 - own))))
        return exchange(output, x, received, sent, group=group)

    def broadcast(x, source, group=None):
        calls.append(("broadcast", 0 if source == dist.get_rank() else x.numel()))
        return cast(x, source, group=group)

    ours = {name: all_gather, "all_to_all_single": all_to_all_single, "batch_isend_irecv": batch_isend_irecv}
    ours["broadcast"] = broadcast
    with patch.multiple(dist, **ours):
        yield


@contextmanager
def named(names: set):
    """Add to names those under which this process waits for other ranks."""
    enter = place._Mark.__enter__

    def enter_and_name(mark):
        if mark._kind is place.Kind.wait:
            names.add(mark._name)
        return enter(mark)

    with patch.object(place._Mark, "__enter__", enter_and_name):
        yield


def differentiate(mix, inputs: list[Tensor], grad: Tensor) -> tuple[list[Tensor], list[list]]:
    """[output, gradient of each input] of mix(*inputs), and the collectives of its forward and backward pass."""
    inputs, forward, backward = [x.clone().requires_grad_() for x in inputs], [], []
    with counted(forward):
        o = mix(*inputs)
    with counted(backward):
        o.backward(grad)
    return [o.detach(), *(x.grad for x in inputs)], [forward, backward]


def check_close(actual: list[Tensor], expected: list[Tensor], tolerance: float, where) -> None:
    """Relative distance of each tensor, against a tenth of the largest where its own norm is less."""
    floor = 0.1 * max(float(x.norm()) for x in expected)
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.dtype == theirs.dtype and ours.isfinite().all(), (where, index)
        assert float((ours - theirs).norm()) <= tolerance * max(float(theirs.norm()), floor), (where, index)


def on_shards(rank: int, mix, inputs: list[Tensor], grad: Tensor, rows: list[list[int]]) -> list:
    """`differentiate` of one rank's shard for each row, where the inputs are: mix(*shards, cu_seqlens, group)."""
    group = dist.group.WORLD
    *inputs, grad = (x.chunk(group.size(), dim=1)[rank] for x in (*inputs, grad))
    found = []
    for edges in rows:
        cu_seqlens = documents.to_device(torch.tensor(edges, dtype=torch.int32), grad.device)
        found.append(differentiate(partial(mix, cu_seqlens=cu_seqlens, group=group), inputs, grad))
    return found
