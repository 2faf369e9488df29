"""Spike counts and their values in plain torch."""

import math

import torch

SMALLEST, LARGEST = 1e-5, 1e4
"""Ends of the threshold."""
LARGEST_COUNT = 2.0**31 - 128
"""The largest float32 that int32 holds."""


@torch.no_grad()
def spike_count(x, *, k=3.0, mean_abs=None):
    """See ops.spike_count."""
    count, threshold = _counted(x, k, mean_abs)
    return count.nan_to_num(0.0).clamp(-LARGEST_COUNT, LARGEST_COUNT).to(torch.int32), threshold


def spike_values(x, *, k=3.0, mean_abs=None):
    """See ops.spike_count."""
    return _SpikeValues.apply(x, k, mean_abs)


class _SpikeValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, k, mean_abs):
        count, threshold = _counted(x, k, mean_abs)
        return (count * threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def _counted(x, k, mean_abs):
    """(count, threshold), both floats; counts of NaN where a quotient is not finite.

    Divided by tensors: on a GPU torch multiplies by the reciprocal of a number.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    mean = _mean_abs(x) if mean_abs is None else mean_abs
    mean = mean.to(x.dtype).to(exact)
    threshold = (mean / torch.full_like(mean, k)).clamp(SMALLEST, LARGEST)
    threshold = threshold.masked_fill(~mean.isfinite(), math.nan)
    quotient = x.to(exact) / threshold
    return quotient.round().masked_fill(quotient.isinf(), math.nan), threshold


def _mean_abs(x):
    """[..., 1]; 0 of no channels."""
    return x.abs().mean(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
