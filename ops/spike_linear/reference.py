"""Linear layer on spike counts in plain torch."""

import math

import torch
from torch.nn.functional import linear

from ops.spike_count.reference import spike_count, spike_values


def spike_linear(x, weight, bias=None, *, k=3.0, weight_scale=None, mean_abs=None):
    """See ops.spike_linear."""
    exact = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(exact)
    if weight.dtype == torch.int8:
        values = _Counted.apply(x, k, mean_abs)
        return linear(values, dequantized(weight, weight_scale).to(exact), bias).to(x.dtype)
    x_seen = spike_values(x, k=k, mean_abs=mean_abs)
    if weight_scale is not None:
        grouped = weight.detach().unflatten(1, (weight_scale.shape[1], -1))
        weight = _Replace.apply(weight, ((grouped / weight_scale).round() * weight_scale).flatten(1).to(weight.dtype))
    return linear(x_seen.to(exact), weight.to(exact), bias).to(x.dtype)


def dequantized(weight, weight_scale):
    """weight int8 [F, D] with weight_scale [F, D / g, 1] as numbers of the scale's dtype."""
    return (weight.unflatten(1, (weight_scale.shape[1], -1)) * weight_scale).flatten(1)


class _Counted(torch.autograd.Function):
    """count * threshold in fp32 or fp64, with a gradient straight through."""

    @staticmethod
    def forward(ctx, x, k, mean_abs):
        ctx.dtype = x.dtype
        count, threshold = spike_count(x, k=k, mean_abs=mean_abs)
        broken = ~x.isfinite().all(-1, keepdim=True)  # a mean that was handed over may not tell
        return count * threshold.masked_fill(broken, math.nan)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None, None


class _Replace(torch.autograd.Function):
    """The second tensor in place of the first, whose gradient passes through."""

    @staticmethod
    def forward(ctx, x, replacement):
        return replacement

    @staticmethod
    def backward(ctx, grad):
        return grad, None
