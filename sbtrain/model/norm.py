"""RMSNorm as a module, for the residual stream, for heads one by one, and for all heads together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ops
from parallel import mcore


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


class AllHeadsNorm(nn.Module):
    """RMSNorm over the channels of all heads, of which each tp rank holds a part: the squares are summed over tp."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype, device, tp_group):
        """size: channels of all tp ranks together."""
        super().__init__()
        self.size, self.eps, self.tp_group = size, eps, tp_group
        self.weight = nn.Parameter(torch.empty(size // tp_group.size(), dtype=dtype, device=device))
        mcore.mark_sharded(self.weight, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size/tp] -> the same shape and dtype."""
        if self.tp_group.size() == 1:
            return ops.rms_norm(x, self.weight, eps=self.eps)
        exact = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(exact)
        squares = mcore.reduce_from_tensor_model_parallel_region(
            wide.square().sum(-1, keepdim=True), group=self.tp_group
        )
        # every rank's output depends on the sum, so its gradient is a sum over the ranks as well
        squares = mcore.copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        return (wide * torch.rsqrt(squares / self.size + self.eps) * self.weight.to(exact)).to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weight as megatron's sharded tensor, cut over tp."""
        key = f"{prefix}weight"
        return {
            key: mcore.make_tp_sharded_tensor_for_checkpoint(
                self.weight,
                key,
                0,
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        }
