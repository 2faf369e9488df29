"""Rotary position embedding with Triton; tiles are the caller's."""

from __future__ import annotations

from typing import Mapping

import torch
import triton

from ops.rope import reference, triton_kernels


def rope(x, positions, inv_freq, *, tiles: Mapping[str, Mapping[str, int]]):
    """See ops.rope; fp64 goes to the reference. tiles: rotate -> TOKENS and HEADS a program, and launch options."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.rope(x, positions, inv_freq)
    return _Rope.apply(x, positions.contiguous(), inv_freq.float().contiguous(), tiles["rotate"])


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, inv_freq, tile):
        ctx.tile = tile
        ctx.save_for_backward(positions, inv_freq)
        return _rotate(x, positions, inv_freq, 1.0, tile)

    @staticmethod
    def backward(ctx, grad_y):
        return _rotate(grad_y, *ctx.saved_tensors, -1.0, ctx.tile), None, None, None


def _rotate(x, positions, inv_freq, direction, tile):
    if x.stride(3) != 1:
        x = x.contiguous()
    num_rows, num_tokens, num_heads, size = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(num_rows * num_tokens, tile["TOKENS"]), triton.cdiv(num_heads, tile["HEADS"]))
    triton_kernels.rotate[grid](
        x,
        y,
        positions,
        inv_freq,
        num_rows * num_tokens,
        num_tokens,
        *x.stride()[:3],
        direction,
        NUM_HEADS=num_heads,
        HALF=size // 2,
        BLOCK_HALF=triton.next_power_of_2(size // 2),
        **tile,
    )
    return y
