"""RMSNorm: y = weight * x / sqrt(mean(x^2) + eps) over the last dimension, fp32 inside, rounded once.

Source: Root Mean Square Layer Normalization (Zhang and Sennrich, 2019). Tolerances against float64, relative norm of
output and gradients: fp32 1e-5, bf16 1e-2.
"""

from __future__ import annotations

from torch import Tensor

from ops.registry import implementation

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype. Raises ValueError when the sizes differ."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}] like x's last dimension, got {list(weight.shape)}")
    return implementation("rms_norm", "rms_norm", x)(x, weight, eps=eps)
