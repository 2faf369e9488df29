"""A linear layer on spike counts: y = threshold * (count @ weight.T) + bias, with weights as floats or as INT8.

Kernels multiply INT8 weights as integers, whatever size the counts have, and the sums of a group of channels are exact;
scales, thresholds and the sum over groups are fp32. The reference multiplies dequantized weights (int8 * scale) and
values (count * threshold) as floats: in fp32 its error is about 3e-7 of the output's norm. Source: SpikingBrain report,
section 3.3 and the released W8ASpike model. Tolerances against float64 with the same thresholds, relative norm of
output and gradients: fp32 1e-5, bf16 1e-2.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ops.registry import implementation
from ops.spike_count import check_countable

__all__ = ["spike_linear"]

GROUP_UNIT = 32
"""Groups of INT8 weights are multiples of this: what one instruction multiplies."""


def spike_linear(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    *,
    k: float = 3.0,
    weight_scale: Optional[Tensor] = None,
    mean_abs: Optional[Tensor] = None,
) -> Tensor:
    """y [..., F] in x's dtype; x [..., D], weight [F, D], bias [F].

    x is replaced by count * threshold (ops.spike_count with k and mean_abs), with its gradient passed straight through.
    A float weight is used as it is, or with weight_scale [F, D / g, 1], g input channels to a group, as
    round(weight / scale) * scale, straight through as well; x is then rounded to its dtype once more.
    An int8 weight needs its weight_scale, fp32 with g a multiple of 32, and gets no gradient; x gets that of a linear
    layer on weight * scale; counts beyond int32 stay at its ends, as those of ops.spike_count do.
    A token with NaN or inf has an output of NaN and leaves the others alone.
    Raises ValueError on shapes that do not fit, and as ops.spike_count does.
    """
    if weight.dim() != 2 or not x.dim() or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [F, D] like x's last dimension, got {list(weight.shape)}, x {list(x.shape)}")
    if bias is not None and list(bias.shape) != [len(weight)]:
        raise ValueError(f"bias must be [{len(weight)}] like weight's rows, got {list(bias.shape)}")
    check_countable(x, k, mean_abs)
    _check_scale(weight, weight_scale)
    call = implementation("spike_linear", "spike_linear", x)
    return call(x, weight, bias, k=float(k), weight_scale=weight_scale, mean_abs=mean_abs)


def _check_scale(weight: Tensor, weight_scale: Optional[Tensor]) -> None:
    num_outputs, size = weight.shape
    is_int8 = weight.dtype == torch.int8
    if not is_int8 and not weight.is_floating_point():
        raise ValueError(f"weight must hold floats or torch.int8, got {weight.dtype}")
    if weight_scale is None:
        if is_int8:
            raise ValueError("weight_scale: missing; an int8 weight needs its scales [F, D / g, 1]")
        return
    shape = list(weight_scale.shape)
    if len(shape) != 3 or shape[0] != num_outputs or shape[2] != 1 or not shape[1] or size % shape[1]:
        raise ValueError(f"weight_scale must be [{num_outputs}, {size} / g, 1] with g dividing {size}, got {shape}")
    if is_int8 and size // shape[1] % GROUP_UNIT:
        group = size // shape[1]
        raise ValueError(f"weight_scale: groups of {group} channels; use a multiple of {GROUP_UNIT} dividing {size}")
