"""RMSNorm: y = weight * x / sqrt(mean(x^2) + eps) over the last dimension, fp32 inside, rounded once; with or without
the addition to a residual stream before it.

Source: Root Mean Square Layer Normalization (Zhang and Sennrich, 2019). Tolerances against float64, relative norm of
output and gradients: fp32 1e-5, bf16 1e-2.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ops.registry import implementation

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Optional[Tensor] = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x [..., D], weight [D] -> y [..., D] in x's dtype; with residual [..., D] of x's dtype -> (y, x + residual).

    The sum is rounded to x's dtype and y is the norm of the rounded sum: bitwise what `x + residual` followed by
    rms_norm gives. Gradients of both outputs are added in fp32 and rounded once; x and residual get the same one.
    Raises ValueError when sizes or dtypes differ.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}] like x's last dimension, got {list(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {list(x.shape)} like x, got {residual.dtype} {list(residual.shape)}"
        )
    return implementation("rms_norm", "rms_norm", x)(x, weight, eps=eps, residual=residual)
