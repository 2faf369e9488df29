"""Symmetric INT8 weights, a scale for each output row and group of input channels.

w is about scale * q with q an integer of -127 to 127; scale = max |w| of the group / 127. The value scale * q is a
fixed point: quantized again it is itself. Source: SpikingBrain report, section 3.3, and the released W8ASpike model
(groups of 128 input channels, scales [F, D / group, 1], no zero points).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def group_scales(weight: Tensor, group: int) -> Tensor:
    """Scales [F, D / group, 1] of a weight [F, D], fp32 or its own dtype if that is wider; 1 for a group of zeros.

    Raises ValueError unless `group` input channels divide D, and where the weight is not finite.
    """
    num_inputs = weight.shape[1]
    if group < 1 or num_inputs % group:
        raise ValueError(f"groups of {group} input channels do not divide {num_inputs}; choose a divisor")
    largest = weight.detach().unflatten(1, (-1, group)).abs().amax(-1, keepdim=True)
    return scale_of(largest.to(torch.promote_types(weight.dtype, torch.float32)))


def scale_of(largest: Tensor) -> Tensor:
    """The scale for the largest |w| of a group, elementwise; 1 for 0. Raises ValueError where it is not finite."""
    if not largest.isfinite().all():
        raise ValueError("a weight is not finite and cannot be quantized; use another checkpoint")
    tiny = torch.finfo(largest.dtype).tiny  # a smaller scale is not normal, and quotients by it overflow
    return torch.where(largest > 0, (largest / LARGEST).clamp_min(tiny), torch.ones_like(largest))


def quantize(weight: Tensor, scales: Tensor) -> Tensor:
    """Integers int8 [F, D] nearest to weight [F, D] / scales [F, G, 1], halves to even, -127 to 127."""
    grouped = weight.detach().to(scales.dtype).unflatten(1, (scales.shape[1], -1))
    return (grouped / scales).round_().clamp_(-LARGEST, LARGEST).flatten(1).to(torch.int8)


def dequantize(integers: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """integers [F, D] * scales [F, G, 1] -> [F, D] in dtype, by default the scales'."""
    values = integers.unflatten(1, (scales.shape[1], -1)) * scales
    return values.flatten(1).to(dtype or scales.dtype)


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """How far quantized [F, D] is from weight in what a layer puts out: |x (w - q)^T| / |x w^T|, Frobenius norms.

    hessian: x^T x [D, D] of the layer's inputs x, times any factor. 0 where the layer puts out nothing.
    """
    squares = [_square(part, hessian) for part in (weight - quantized, weight)]
    return (squares[0] / squares[1]) ** 0.5 if squares[1] > 0 else 0.0


def _square(weight: Tensor, hessian: Tensor, rows: int = 4096) -> float:
    """tr(w hessian w^T), without another matrix of the weight's size."""
    parts = ((part @ hessian).mul_(part).sum(dtype=torch.float64) for part in weight.split(rows))
    return max(float(sum(parts)), 0.0)
