"""Collectives with gradients: each is an autograd Function whose backward is its transpose; the group is an argument.

A group of one rank returns its input at once. `together` lets all ranks fail where one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.place import primitive

Result = TypeVar("Result")


class _AllToAll(torch.autograd.Function):
    """Split one dimension over the ranks and concatenate another; the transpose swaps the two."""

    @staticmethod
    def forward(ctx, x: Tensor, group, split_dim: int, concat_dim: int, name: str) -> Tensor:
        ctx.group, ctx.split_dim, ctx.concat_dim, ctx.name = group, split_dim, concat_dim, name
        return _exchange(x, group, split_dim, concat_dim, name)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _exchange(grad, ctx.group, ctx.concat_dim, ctx.split_dim, ctx.name), None, None, None, None


def _exchange(x: Tensor, group, split_dim: int, concat_dim: int, name: str) -> Tensor:
    send = torch.stack(x.chunk(group.size(), dim=split_dim)).contiguous()
    receive = torch.empty_like(send)
    with primitive(name):
        dist.all_to_all_single(receive, send, group=group)
    return torch.cat(receive.unbind(0), dim=concat_dim)


def all_to_all(x: Tensor, *, group, split_dim: int, concat_dim: int, name: str = "all-to-all") -> Tensor:
    """Send the i-th slice of split_dim to rank i; concatenate what arrives along concat_dim, in rank order.

    split_dim must be divisible by the group's size. Sends (size - 1)/size of x per rank. name: what it is for, see
    parallel.place.
    """
    if group.size() == 1:
        return x
    return _AllToAll.apply(x, group, split_dim, concat_dim, name)


def all_gather(x: Tensor, *, group, name: str = "all-gather") -> Callable[[], Tensor]:
    """Start an all-gather; the function returned waits for it and gives [size, *x.shape], in rank order.

    Without gradients: callers know a better transpose. name: what it is for, see parallel.place.
    """
    everyone = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    gather = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )  # newer torch deprecates the older name
    work = gather(everyone, x, group=group, async_op=True)

    def wait() -> Tensor:
        with primitive(name):
            work.wait()
        return everyone.view(group.size(), *x.shape)

    return wait


def exchange_rows(x: Tensor, *, send: list[int], receive: list[int], group, name: str) -> Tensor:
    """Rows of x by the rank they go to -> rows by the rank they come from [sum(receive), ...]. Without gradients.

    send, receive: rows for and from each rank, 0 where two have nothing for each other. name: what it is for.
    """
    if group.size() == 1:
        return x
    received = x.new_empty(sum(receive), *x.shape[1:])
    with primitive(name):
        dist.all_to_all_single(received, x, receive, send, group=group)
    return received


def from_last(x: Tensor, *, group, name: str) -> Tensor:
    """The last rank's x on every rank; x has one shape on all of them. Without gradients. name: what it is for."""
    x = x.clone(memory_format=torch.contiguous_format)
    with primitive(name):
        dist.broadcast(x, dist.get_global_rank(group, group.size() - 1), group=group)
    return x


def together(call: Callable[[], Result]) -> Result:
    """call() on every rank; what it raises on one, a file that only this host cannot read say, all ranks raise.

    Collective. Raises ValueError with the first failing rank's line, for ValueError and OSError, on that rank the very
    exception; other exceptions are bugs and end their rank.
    """
    result, problem, ours = None, None, None
    try:
        result = call()
    except ValueError as error:
        problem, ours = str(error), error
    except OSError as error:
        problem = f"{error.filename or 'a file'}: {error.strerror or error}; make it readable and writable"
    problems = [problem]
    if dist.get_world_size() > 1:
        problems *= dist.get_world_size()
        with primitive("together"):
            dist.all_gather_object(problems, problem)
    first = next((text for text in problems if text), None)
    if first:
        raise ours if ours is not None and first == problem else ValueError(first)
    return result
