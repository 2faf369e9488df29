"""Activations as integer spike counts with a threshold per token, and what the counts stand for.

threshold = mean(|x|) / k over the last dimension, clamped to 1e-5 .. 1e4; count = round(x / threshold), half to even,
not clamped to a range of bits. Nothing is calibrated. The mean is rounded to x's dtype, as in the released code, and
everything after it is fp32 (fp64 for fp64). A mean that is not finite (NaN or inf in the token) makes a threshold of
NaN, counts of 0 and values of NaN. Source: SpikingBrain report, section 3.3.1, and the released W8ASpike model.
Tolerance: given the threshold, counts and values are exact. Backends add up the mean in different orders, which the
rounding to bf16 or fp16 nearly always hides.
"""

from __future__ import annotations

from numbers import Real
from typing import Optional

import torch
from torch import Tensor

from ops.registry import implementation

__all__ = ["spike_count", "spike_values"]

SMALLEST_K, LARGEST_K = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""Ends of k: thresholds divide by it in fp32, where less may be 0 and more is inf."""


def spike_count(x: Tensor, *, k: float = 3.0, mean_abs: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """(count int32 [..., D], threshold [..., 1] fp32 or fp64) of x [..., D]; x is about count * threshold.

    k: spikes per mean activation. mean_abs [..., 1], in x's dtype or fp32: the mean of |x| over the whole token, where
    x is only a part of its channels; rounded to x's dtype like x's own. Counts beyond int32 stay at its ends. No
    gradient: ops.spike_values passes it straight through. Raises ValueError unless k is positive and finite in fp32, x
    has floats and mean_abs fits.
    """
    check_countable(x, k, mean_abs)
    return implementation("spike_count", "spike_count", x)(x, k=float(k), mean_abs=mean_abs)


def spike_values(x: Tensor, *, k: float = 3.0, mean_abs: Optional[Tensor] = None) -> Tensor:
    """count * threshold [..., D] of ops.spike_count, rounded once to x's dtype.

    A value is up to half a threshold from its number: in fp16, finite numbers near the largest, 65504, may become inf
    (65504 everywhere does with k=3, as thresholds end at 1e4). Counts are floats here, with no ends like int32's.
    Its gradient is x's, straight through: counting and the threshold are skipped; mean_abs gets none. Arguments and
    errors as in ops.spike_count.
    """
    check_countable(x, k, mean_abs)
    return implementation("spike_count", "spike_values", x)(x, k=float(k), mean_abs=mean_abs)


def check_countable(x: Tensor, k: float, mean_abs: Optional[Tensor]) -> None:
    """Raise ValueError unless x can be counted with k, and mean_abs is None or a mean of each of its tokens."""
    if not isinstance(k, Real) or not SMALLEST_K <= k <= LARGEST_K:
        raise ValueError(f"k must be positive and finite in fp32 (spikes per mean activation, such as 3.0), got {k!r}")
    if not x.dim() or not x.is_floating_point():
        raise ValueError(f"x must be floats [..., D], got {x.dtype} {list(x.shape)}")
    if mean_abs is None:
        return
    shape = [*x.shape[:-1], 1]
    if list(mean_abs.shape) != shape or mean_abs.dtype not in (x.dtype, torch.float32):
        found = f"{mean_abs.dtype} {list(mean_abs.shape)}"
        raise ValueError(f"mean_abs must be {shape} in {x.dtype} or torch.float32 like x's tokens, got {found}")
