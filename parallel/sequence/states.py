"""Gated linear attention over the shards of a row, which hand on states of fixed size.

Each rank reduces its shard to the state that the shard alone leaves behind and the decay it puts on what came before.
The states that enter the shards are one recurrence over the ranks:

    in[0] = 0        in[r + 1] = exp(decay[r]) * in[r] + state[r]

and their gradients the same one from the right, on the gradients of the entering states. How it travels is an
exchange's business (lasp2, zeco); they give the same bits. A document that starts in a shard has decay -inf there
(ops.gla_state), so nothing crosses it, and every rank makes the same calls whatever its documents are.

A state that every document starts from is the same on every rank: a document adds it where it starts, as the part of
state[r] that is left of it at the end of the shard. Nothing more travels.

With overlap, the rank computes what its shard gives without the states while they travel, forward and backward
(ops.gla), and adds their part last (ops.gla_carry). That part costs more than the waiting where links are fast: without
overlap, the default inside a host, it waits and computes all at once (ops.gla_output).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

import ops
from ops.documents import bounds
from parallel.collectives import from_last
from parallel.sequence.shard import shard_documents

Exchange = Callable[..., Callable[[], Tensor]]
"""(state fp32 [Hkv, K, V], decay [Hkv, K], *, group, reverse) of this rank -> a function that waits for the state
that enters it, [Hkv, K, V], from the left or, reverse, from the right. Collective."""


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    cu_seqlens: Tensor,
    group,
    exchange: Exchange,
    overlap: bool,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ops.gla on one shard of a row, the shards of the group's ranks side by side: o [1, T/sp, Hq, V].

    q [1, T/sp, Hq, K], k and log_decay [1, T/sp, Hkv, K], v [1, T/sp, Hkv, V]; cu_seqlens int32 [N+1] of the whole row.
    Collective, and so is its backward pass. Any number of heads goes with any sp.
    initial_state [Hkv, K, V]: of every document, the same on every rank, its gradients add up over the ranks; None: 0.
    return_state, of a row of one document: (o, the state [1, Hkv, K, V] after the row, on every rank and without
    gradients); the last rank broadcasts it, Hkv * K * V elements in fp32.
    """
    if group.size() == 1:
        first = None if initial_state is None else of_each(initial_state, cu_seqlens)
        about = dict(initial_state=first, cu_seqlens=cu_seqlens)
        o, state = ops.gla(q, k, v, log_decay, **about, output_final_state=return_state)
        return (o, state) if return_state else o
    documents = shard_documents(cu_seqlens, rank=group.rank(), size=group.size())
    state, decay = ops.gla_state(k, v, log_decay, cu_seqlens=documents)
    starting = None
    if initial_state is not None:
        starting = _starting(initial_state, documents, begins=group.rank() == 0)
        if group.rank() == 0 or len(starting) > 1:
            state = state + _left_of(initial_state, log_decay, documents)
    passage = _Passage(exchange, group)
    ticket = _Leave.apply(state, decay, passage)
    o = ops.gla(q, k, v, log_decay, initial_state=starting, cu_seqlens=documents)[0] if overlap else None
    state_in, q = _Enter.apply(ticket, q, passage)
    if overlap:
        o = ops.gla_carry(o, q, log_decay, state_in, cu_seqlens=documents)
    elif starting is None:
        o = ops.gla_output(q, k, v, log_decay, state_in, cu_seqlens=documents)
    else:
        starting = torch.cat([starting[:1] + state_in, starting[1:]])
        o, _ = ops.gla(q, k, v, log_decay, initial_state=starting, cu_seqlens=documents)
    if not return_state:
        return o
    leaving = torch.addcmul(state, decay.exp()[..., None], state_in).detach()
    return o, from_last(leaving[None], group=group, name="broadcast of the last state")


def of_each(initial_state: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A state [Hkv, K, V] for each document, [N, Hkv, K, V]."""
    return initial_state.expand(len(cu_seqlens) - 1, *initial_state.shape)


def _starting(initial_state: Tensor, documents: Tensor, *, begins: bool) -> Tensor:
    """The state that each of a shard's documents starts from, [N, Hkv, K, V].

    It is 0 for the one that enters from the left, unless the row begins there.
    """
    everyone = of_each(initial_state, documents)
    return everyone if begins else torch.cat([torch.zeros_like(everyone[:1]), everyone[1:]])


def _left_of(initial_state: Tensor, log_decay: Tensor, documents: Tensor) -> Tensor:
    """What the document that leaves a shard, and starts in it, takes along of the state it started from."""
    start = bounds(documents)[-2]
    decay = log_decay[0, start:].to(initial_state.dtype).sum(0)
    return decay.exp()[..., None] * initial_state


def spans_hosts(group) -> bool:
    """Whether the group's ranks are on several hosts, by what torchrun or srun says of the ranks of a host."""
    if group.size() == 1:
        return False
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # "8(x2)"
    found = re.match(r"\d+", text)
    local = int(found[0]) if found else dist.get_world_size()
    return len({rank // local for rank in dist.get_process_group_ranks(group)}) > 1


class _Passage:
    """What is under way between `_Leave` and `_Enter` of one call, and on the way back."""

    def __init__(self, exchange: Exchange, group):
        self.exchange, self.group = exchange, group
        self.arrival = self.decay = self.state_in = None

    def send(self, state: Tensor, *, reverse: bool) -> None:
        """Let a state, or reverse a gradient, set out."""
        self.arrival = self.exchange(state, self.decay, group=self.group, reverse=reverse)

    def receive(self) -> Tensor:
        """Wait for what enters this rank."""
        arrival, self.arrival = self.arrival, None
        return arrival()


class _Leave(torch.autograd.Function):
    """Send the state off; the ticket is for `_Enter`. Backward comes last, when the gradient must have arrived."""

    @staticmethod
    def forward(ctx, state: Tensor, decay: Tensor, passage: _Passage) -> Tensor:
        ctx.passage, passage.decay = passage, decay
        passage.send(state, reverse=False)
        return state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        passage = ctx.passage
        grad_state = passage.receive()
        grad_decay = passage.decay.exp() * (grad_state * passage.state_in).sum(-1)
        return grad_state, grad_decay, None


class _Enter(torch.autograd.Function):
    """Wait for the state that enters. Backward sends its gradient off, before that of the shard's own work begins:
    autograd runs what was called last first.

    q passes through: the output always depends on it, so that every rank's backward pass comes by here, also where no
    document enters and the state has no part in the output.
    """

    @staticmethod
    def forward(ctx, ticket: Tensor, q: Tensor, passage: _Passage) -> tuple[Tensor, Tensor]:
        ctx.passage = passage
        passage.state_in = passage.receive()
        return passage.state_in.view_as(passage.state_in), q.view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_q: Tensor):
        ctx.passage.send(grad.contiguous(), reverse=True)
        return grad.new_zeros(0), grad_q, None
