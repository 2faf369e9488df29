"""Linear layer on spike counts in plain torch."""

import torch
from torch.nn.functional import linear

from ops.spike_count.reference import spike_count


def spike_linear(x, weight, bias=None, *, k=3.0, weight_scale=None):
    """See ops.spike_linear."""
    exact = torch.promote_types(x.dtype, torch.float32)
    count, threshold = spike_count(x, k=k)
    x_seen = _Replace.apply(x, (count * threshold).to(x.dtype))
    if weight_scale is not None:
        grouped = weight.detach().unflatten(1, (weight_scale.shape[1], -1))
        weight = _Replace.apply(weight, ((grouped / weight_scale).round() * weight_scale).flatten(1).to(weight.dtype))
    y = linear(x_seen.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
    return y.to(x.dtype)


class _Replace(torch.autograd.Function):
    """The second tensor in place of the first, whose gradient passes through."""

    @staticmethod
    def forward(ctx, x, replacement):
        return replacement

    @staticmethod
    def backward(ctx, grad):
        return grad, None
