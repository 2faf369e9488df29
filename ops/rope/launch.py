"""Rotary position embedding with Triton; shared by the backends' files."""

from __future__ import annotations

from typing import Mapping

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.launch import Launcher, Prepared
from ops.rope import reference, triton_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MANY = 8
"""More heads have tiles of their own: a program then takes whole tokens, whose numbers lie side by side."""


class Implementation:
    """ops.rope with the tiles of a backend."""

    def __init__(self, backend: str):
        self.prepared = Prepared("rope", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.rope

    def accepts(self, name: str, x: Tensor, positions: Tensor, inv_freq: Tensor) -> str | None:
        """Why a call cannot run here; None when it can."""
        return None if x.dtype in DTYPES else "takes bf16, fp16 and fp32"

    def rope(self, x, positions, inv_freq):
        """See ops.rope."""
        if x.numel() == 0:
            return reference.rope(x, positions, inv_freq)
        kernels = self.prepared(Kernels, *x.shape[2:])
        return _Rope.apply(x, positions.contiguous(), inv_freq.float().contiguous(), kernels)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, inv_freq, kernels):
        ctx.kernels = kernels
        ctx.save_for_backward(positions, inv_freq)
        return kernels.rotate(x, positions, inv_freq, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        return ctx.kernels.rotate(grad_y, *ctx.saved_tensors, -1.0), None, None, None


class Kernels:
    """The kernel for given heads. launchers: it alone."""

    def __init__(self, num_heads: int, size: int, entries: Mapping[str, Mapping]):
        tile, half = entries["rotate_many" if num_heads > MANY else "rotate"], size // 2
        heads = min(tile["HEADS"], triton.next_power_of_2(num_heads))
        self.tokens, self.parts = tile["TOKENS"], triton.cdiv(num_heads, heads)
        sizes = dict(NUM_HEADS=num_heads, HALF=half, BLOCK_HALF=triton.next_power_of_2(half), HEADS=heads)
        self.launchers = [Launcher(triton_kernels.rotate, sizes, tile)]

    def rotate(self, x, positions, inv_freq, direction: float) -> Tensor:
        """x [B, T, H, D] turned by direction * position * inv_freq, contiguous."""
        if x.stride(3) != 1:
            x = x.contiguous()
        num_rows, row_tokens = x.shape[:2]
        y, num_tokens = torch.empty(x.shape, dtype=x.dtype, device=x.device), num_rows * row_tokens
        grid = (triton.cdiv(num_tokens, self.tokens), self.parts)
        sizes = (num_tokens, row_tokens, *x.stride()[:3])
        self.launchers[0](grid, x, y, positions, inv_freq, *sizes, direction)
        return y
