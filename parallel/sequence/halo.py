"""Halo exchange for sliding windows: each rank fetches the keys and values that its first queries see on the left.

A shard that starts at token b of a document that starts at s needs min(w - 1, b - s) tokens before b, from one rank or
from several where shards are shorter than the window; none where a document starts with the shard. The backward pass
returns their gradients. One uneven all-to-all carries all of it: every rank makes the same call whatever its
documents are, and ranks that have nothing for each other exchange nothing.

Elements that each rank receives, a layer: halo * Hkv * (D + V) forward, at most (w - 1) * Hkv * 2 * D, and backward
as many as it sent forward: what its right neighbors fetched of its own.

The halo has no queries: each rank computes the query-key pairs of its own shard, T/sp * w a head where no document
starts, and nothing twice.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import ops
from ops import documents
from parallel.collectives import exchange_rows
from parallel.sequence.shard import cuts_of, with_bounds

_NAME = "halo all-to-all"


@dataclass(frozen=True)
class Plan:
    """Who fetches what, on one rank.

    num_tokens: length of this rank's halo. receive: its tokens by the rank they come from. send: by destination, the
    part of this rank's shard that goes there. cu_seqlens: int32, of halo and shard together.
    """

    num_tokens: int
    receive: list[int]
    send: list[slice]
    cu_seqlens: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, window: int, cu_seqlens: Tensor, group, **sinks: Tensor) -> Tensor:
    """ops.attention with a window on one shard of a row, the shards of the group's ranks side by side: [1,T/sp,Hq,V].

    q [1, T/sp, Hq, D], k [1, T/sp, Hkv, D], v [1, T/sp, Hkv, V], rotated already; cu_seqlens int32 [N+1] of the whole
    row; sinks: sink_k and sink_v of ops.attention, the same on every rank, whose gradients add up over the ranks.
    Collective, and so is its backward pass. Any number of heads goes with any sp.
    """
    if group.size() == 1:
        return ops.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, **sinks)
    plan = plan_of(cu_seqlens, window=window, rank=group.rank(), size=group.size())
    k, v = _Fetch.apply(k, v, plan, group)
    return ops.attention(q, k, v, window=window, cu_seqlens=plan.cu_seqlens, **sinks)


def plan_of(cu_seqlens: Tensor, *, window: int, rank: int, size: int) -> Plan:
    """The plan of one rank, from the whole row's documents; kept with them."""

    def build() -> Plan:
        """The plan from the documents' bounds on the host."""
        edges = documents.bounds(cu_seqlens)
        shard_tokens = edges[-1] // size
        starts = [shard * shard_tokens for shard in range(size)]
        halos = [min(window - 1, start - edges[bisect_right(edges, start) - 1]) for start in starts]

        def fetched(source: int, destination: int) -> slice:
            """What a rank fetches of another's shard, in the other's own tokens."""
            first = starts[destination] - halos[destination] - starts[source]
            first = min(max(first, 0), shard_tokens) if source < destination else shard_tokens
            return slice(first, shard_tokens)

        receive = [_length(fetched(source, rank)) for source in range(size)]
        send = [fetched(rank, destination) for destination in range(size)]
        halo = halos[rank]
        inner = [halo + cut for cut in cuts_of(cu_seqlens, rank=rank, size=size) if 0 < cut < shard_tokens]
        return Plan(halo, receive, send, with_bounds([0, *inner, halo + shard_tokens], cu_seqlens.device))

    return documents.derived(cu_seqlens, ("halo", window, rank, size), build)


def _length(part: slice) -> int:
    return part.stop - part.start


class _Fetch(torch.autograd.Function):
    """k and v with the halo in front; the transpose sends the halo's gradients back and adds what comes back."""

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, plan: Plan, group):
        ctx.plan, ctx.group, ctx.key_size = plan, group, k.shape[-1]
        sent = torch.cat([torch.cat([k[0, part], v[0, part]], dim=-1) for part in plan.send])
        sizes = [_length(part) for part in plan.send]
        halo = exchange_rows(sent, send=sizes, receive=plan.receive, group=group, name=_NAME)[None]
        halo_k, halo_v = halo.tensor_split([ctx.key_size], dim=-1)
        return torch.cat([halo_k, k], dim=1), torch.cat([halo_v, v], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_k: Tensor, grad_v: Tensor):
        plan, sizes = ctx.plan, [_length(part) for part in ctx.plan.send]
        halo = torch.cat([grad[0, : plan.num_tokens] for grad in (grad_k, grad_v)], dim=-1)
        returned = exchange_rows(halo, send=plan.receive, receive=sizes, group=ctx.group, name=_NAME)
        grad_k, grad_v = (grad[:, plan.num_tokens :].clone() for grad in (grad_k, grad_v))
        for part, grad in zip(plan.send, returned.split(sizes)):
            grad_k[0, part] += grad[..., : ctx.key_size]
            grad_v[0, part] += grad[..., ctx.key_size :]
        return grad_k, grad_v, None, None
