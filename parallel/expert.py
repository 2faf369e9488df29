"""Rows over the ranks of expert parallelism: an exchange that computes while it runs, and copies of hot weights."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import all_gather
from parallel.place import primitive


class Exchange:
    """One all-to-all of rows. Work called between start and wait overlaps with it, in the backward pass as well.

    start(x) sends x [sum(send), D]; wait() gives [sum(receive), D], rows by the rank they come from. The backward pass
    starts the way back where wait was and waits where start was: autograd runs what lies between in the meantime.
    """

    def __init__(self, *, send: list[int], receive: list[int], group, name: str):
        """send, receive: rows for and from each rank of group. name: what it is for, see parallel.place."""
        self.send, self.receive, self.group, self.name = send, receive, group, name
        self._token: Tensor | None = None
        self._work, self._held = None, ()

    def start(self, x: Tensor) -> None:
        """Begin to send the rows of x."""
        self._token = _Start.apply(x, self)

    def wait(self) -> Tensor:
        """The rows that arrived."""
        token, self._token = self._token, None
        return _Wait.apply(token, self)

    def launch(self, x: Tensor, *, back: bool) -> None:
        """Start the collective itself, without gradients. back: from receivers to senders."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        x = x.contiguous()
        received = x.new_empty(sum(receive), *x.shape[1:])
        with primitive(self.name):
            self._work = dist.all_to_all_single(received, x, receive, send, group=self.group, async_op=True)
        self._held = (received, x)

    def landed(self) -> Tensor:
        """Wait for what launch has started."""
        with primitive(self.name):
            self._work.wait()
        received, self._work, self._held = self._held[0], None, ()
        return received


class _Start(torch.autograd.Function):
    """x -> an empty token that carries the order of things through autograd."""

    @staticmethod
    def forward(ctx, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.launch(x, back=False)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, grad_token: Tensor):
        return ctx.exchange.landed(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.landed()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.exchange.launch(grad, back=True)
        return grad.new_empty(0), None


def gather_counts(counts: Tensor, *, group) -> Tensor:
    """counts [N] of every rank of group -> [size, N], in rank order."""
    if group.size() == 1:
        return counts[None]
    return all_gather(counts, group=group, name="rows of each expert")()


class Fetched:
    """Integers on their way to the host. What is put into the device's queue until tolist is called runs meanwhile."""

    def __init__(self, x: Tensor):
        self._copy, self._event = x.to("cpu", non_blocking=True), None
        if x.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def tolist(self) -> list:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


def copy_from(owner: int, x: Tensor, *, group) -> None:
    """Fill x with what rank `owner` of group has in it."""
    with primitive("copy of a hot expert"):
        dist.broadcast(x, dist.get_global_rank(group, owner), group=group)


def sum_at(owner: int, x: Tensor, *, group) -> None:
    """Make x on rank `owner` of group the sum of all ranks' x; on other ranks it is used up."""
    with primitive("gradient of a hot expert"):
        dist.reduce(x, dist.get_global_rank(group, owner), group=group)


def sum_over_all(x: Tensor) -> None:
    """Make x the sum over all ranks of the world."""
    with primitive("expert load"):
        dist.all_reduce(x)
