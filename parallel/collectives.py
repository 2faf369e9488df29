"""Collectives with gradients: each is an autograd Function whose backward is its transpose; the group is an argument.

A group of one rank returns its input at once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """Split one dimension over the ranks and concatenate another; the transpose swaps the two."""

    @staticmethod
    def forward(ctx, x: Tensor, group, split_dim: int, concat_dim: int) -> Tensor:
        ctx.group, ctx.split_dim, ctx.concat_dim = group, split_dim, concat_dim
        return _exchange(x, group, split_dim, concat_dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _exchange(grad, ctx.group, ctx.concat_dim, ctx.split_dim), None, None, None


def _exchange(x: Tensor, group, split_dim: int, concat_dim: int) -> Tensor:
    send = torch.stack(x.chunk(group.size(), dim=split_dim)).contiguous()
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group)
    return torch.cat(receive.unbind(0), dim=concat_dim)


def all_to_all(x: Tensor, *, group, split_dim: int, concat_dim: int) -> Tensor:
    """Send the i-th slice of split_dim to rank i; concatenate what arrives along concat_dim, in rank order.

    split_dim must be divisible by the group's size. Sends (size - 1)/size of x per rank.
    """
    if group.size() == 1:
        return x
    return _AllToAll.apply(x, group, split_dim, concat_dim)
