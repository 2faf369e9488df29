"""RMSNorm as a module, for the residual stream and for heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ops


class RMSNorm(nn.Module):
    """y = x / rms(x) · weight over the last dimension, plain weight (not 1 + w), fp32 inside.

    over_heads: the weight is shared by all heads while each tp rank holds some; its gradient is summed over tp_group.
    sequence_parallel: the rank sees a part of the tokens only; the engine sums the weight's gradient over tp.
    """

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype, device, over_heads=None, sequence_parallel=False):
        super().__init__()
        self.eps = eps
        self.over_heads = over_heads
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., size] -> the same shape and dtype; with residual, of x + residual, and that sum after it."""
        weight = self.weight if self.over_heads is None else self.over_heads(self.weight)
        return ops.rms_norm(x, weight, eps=self.eps, residual=residual)
