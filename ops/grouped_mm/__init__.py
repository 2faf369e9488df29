"""Matrix products of consecutive groups of rows with one weight each: the experts of a mixture of experts.

Tolerances against float64, relative norm of output and gradients: fp32 1e-5, bf16 1e-2.
"""

from __future__ import annotations

from torch import Tensor

from ops.registry import implementation

__all__ = ["grouped_mm"]


def grouped_mm(x: Tensor, weight: Tensor, *, offsets: Tensor) -> Tensor:
    """y [T, F] in x's dtype: rows offsets[e] .. offsets[e+1] of x times weight[e] transposed.

    x [T, D] sorted by expert, weight [E, F, D] (each as a linear layer stores it), offsets int32 [E+1], first 0, last
    T; groups may be empty. Raises ValueError on shapes that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1] or offsets.shape != (len(weight) + 1,):
        shapes = ", ".join(str(list(y.shape)) for y in (x, weight, offsets))
        raise ValueError(f"x, weight, offsets must be [T, D], [E, F, D], [E+1]; got {shapes}")
    return implementation("grouped_mm", "grouped_mm", x)(x, weight, offsets=offsets)
