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
"""More heads, queries and keys together, have tiles of their own: programs then take whole tokens, side by side."""


class Implementation:
    """ops.rope and ops.rope_qk with the tiles of a backend."""

    def __init__(self, backend: str):
        self.prepared = Prepared("rope", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.rope, self.rope_qk

    def accepts(self, name: str, x: Tensor, *rest: Tensor) -> str | None:
        """Why a call cannot run here; None when it can."""
        return None if x.dtype in DTYPES else "takes bf16, fp16 and fp32"

    def rope(self, x, positions, inv_freq):
        """See ops.rope."""
        if x.numel() == 0:
            return reference.rope(x, positions, inv_freq)
        kernels = self.prepared(Kernels, x.shape[2], 0, x.shape[3])
        return _Rope.apply(positions.contiguous(), inv_freq.float().contiguous(), kernels, x)[0]

    def rope_qk(self, q, k, positions, inv_freq):
        """See ops.rope_qk."""
        if q.numel() == 0 or k.numel() == 0:
            return reference.rope_qk(q, k, positions, inv_freq)
        kernels = self.prepared(Kernels, q.shape[2], k.shape[2], q.shape[3])
        return _Rope.apply(positions.contiguous(), inv_freq.float().contiguous(), kernels, q, k)


class _Rope(torch.autograd.Function):
    """One tensor or two, turned."""

    @staticmethod
    def forward(ctx, positions, inv_freq, kernels, *tensors):
        ctx.kernels = kernels
        ctx.save_for_backward(positions, inv_freq)
        return kernels.rotate(tensors, positions, inv_freq, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return None, None, None, *ctx.kernels.rotate(gradients, *ctx.saved_tensors, -1.0)


class Kernels:
    """The kernel for given heads, those of keys 0 for a tensor by itself. launchers: it alone."""

    def __init__(self, num_heads: int, num_key_heads: int, size: int, entries: Mapping[str, Mapping]):
        together, half = num_heads + num_key_heads, size // 2
        tile = entries["rotate_many" if together > MANY else "rotate"]
        heads = min(tile["HEADS"], triton.next_power_of_2(together))
        self.tokens, self.parts = tile["TOKENS"], triton.cdiv(together, heads)
        sizes = dict(NUM_HEADS=num_heads, NUM_KEY_HEADS=num_key_heads, HEADS=heads)
        sizes |= dict(HALF=half, BLOCK_HALF=triton.next_power_of_2(half))
        self.launchers = [Launcher(triton_kernels.rotate, sizes, tile)]

    def rotate(self, tensors, positions, inv_freq, direction: float) -> tuple[Tensor, ...]:
        """One tensor [B, T, H, D], or two, turned by direction * position * inv_freq, contiguous."""
        tensors = [x if x.stride(3) == 1 else x.contiguous() for x in tensors]
        turned = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
        num_rows, row_tokens = positions.shape
        grid = (triton.cdiv(num_rows * row_tokens, self.tokens), self.parts)
        sizes = (num_rows * row_tokens, row_tokens, *tensors[0].stride()[:3], *tensors[-1].stride()[:3])
        pairs = (tensors[0], tensors[-1], turned[0], turned[-1])
        self.launchers[0](grid, *pairs, positions, inv_freq, *sizes, direction)
        return turned
