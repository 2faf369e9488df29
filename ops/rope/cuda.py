"""Rotary position embedding on NVIDIA GPUs: one pass, reading x where it lies. fp64 goes to the reference."""

from __future__ import annotations

import torch
import triton

from ops.rope import reference, triton_kernels


def rope(x, positions, inv_freq):
    """See ops.rope."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.rope(x, positions, inv_freq)
    return _Rope.apply(x, positions.contiguous(), inv_freq.float().contiguous())


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, inv_freq):
        ctx.save_for_backward(positions, inv_freq)
        return _rotate(x, positions, inv_freq, 1.0)

    @staticmethod
    def backward(ctx, grad_y):
        return _rotate(grad_y, *ctx.saved_tensors, -1.0), None, None


def _rotate(x, positions, inv_freq, direction):
    if x.stride(3) != 1:
        x = x.contiguous()
    num_rows, num_tokens, num_heads, size = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_kernels.rotate[(num_rows * num_tokens,)](
        x,
        y,
        positions,
        inv_freq,
        num_tokens,
        *x.stride()[:3],
        direction,
        HEADS=num_heads,
        HALF=size // 2,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        BLOCK_HALF=triton.next_power_of_2(size // 2),
    )
    return y
