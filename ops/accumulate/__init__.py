"""A gradient into its fp32 accumulator, in place: added to what is there or written over it.

torch's own addition of bf16 to fp32 reads and writes element by element. Tolerance: none, it is exact but for the
rounding of one fp32 addition.
"""

from __future__ import annotations

from torch import Tensor

from ops.registry import implementation

__all__ = ["accumulate"]


def accumulate(total: Tensor, part: Tensor, *, add: bool) -> Tensor:
    """total, which becomes total + part (add) or part. No gradient.

    total contiguous fp32 (fp64 on the CPU), part of the same shape in any floating dtype. Raises ValueError where the
    shapes differ.
    """
    if total.shape != part.shape:
        raise ValueError(f"total and part must have one shape, got {list(total.shape)} and {list(part.shape)}")
    return implementation("accumulate", "accumulate", total)(total, part, add=add)
