"""Activations as integer spike counts with a threshold per token.

threshold = mean(|x|) / k over the last dimension, clamped to 1e-5 .. 1e4; count = round(x / threshold), half to even,
not clamped. Nothing is calibrated. Source: SpikingBrain report, section 3.3. Tolerance: counts are compared exactly
given the threshold. Backends: reference only for now.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ops.registry import implementation

__all__ = ["spike_count", "spike_values"]


def spike_count(x: Tensor, *, k: float = 3.0, mean_abs: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """(count int32 [..., D], threshold [..., 1] fp32 or fp64) of x [..., D]; x is about count * threshold.

    The mean is taken in x's dtype, as the released code does; mean_abs [..., 1] is that of the whole token where x
    holds a part of its channels. No gradient: ops.spike_linear passes it straight through. ValueError unless k > 0.
    """
    _check(k)
    return implementation("spike_count", "spike_count", x)(x, k=k, mean_abs=mean_abs)


def spike_values(x: Tensor, *, k: float = 3.0, mean_abs: Optional[Tensor] = None) -> Tensor:
    """count * threshold in x's dtype, see spike_count; gradients pass straight through. ValueError unless k > 0."""
    _check(k)
    return implementation("spike_count", "spike_values", x)(x, k=k, mean_abs=mean_abs)


def _check(k: float) -> None:
    if not k > 0:
        raise ValueError(f"k must be positive (spikes per mean activation), got {k}")
