"""A linear layer on spike counts: y = threshold * (count @ weight.T) + bias, with optional grouped INT8 weights.

Source: SpikingBrain report, section 3.3 and the released W8ASpike model. Tolerances against float64 with the same
counts, relative norm of output and gradients: fp32 1e-5, bf16 1e-2. Backends: reference only for now.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ops.registry import implementation

__all__ = ["spike_linear"]


def spike_linear(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    *,
    k: float = 3.0,
    weight_scale: Optional[Tensor] = None,
) -> Tensor:
    """y [..., F] in x's dtype; x [..., D], weight [F, D], bias [F].

    x is replaced by count * threshold (ops.spike_count with k), rounded to x's dtype. weight_scale [F, D / g, 1], g
    input channels to a group, replaces the weight by round(weight / scale) * scale. Both replacements pass gradients
    straight through: x and weight get those of the linear layer on the replaced values.
    Raises ValueError on shapes that do not fit.
    """
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [F, {x.shape[-1]}] for x {list(x.shape)}, got {list(weight.shape)}")
    if weight_scale is not None and (len(weight_scale) != len(weight) or weight.shape[1] % weight_scale.shape[1]):
        raise ValueError(f"weight_scale must be [F, D / g, 1] for {list(weight.shape)}, got {list(weight_scale.shape)}")
    return implementation("spike_linear", "spike_linear", x)(x, weight, bias, k=k, weight_scale=weight_scale)
