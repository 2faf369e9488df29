"""SwiGLU with Triton: one pass forward, one pass backward; tiles are the caller's."""

from __future__ import annotations

from typing import Mapping

import torch
import triton

from ops.swiglu import reference, triton_kernels


def swiglu(gate_up, *, tiles: Mapping[str, Mapping[str, int]]):
    """See ops.swiglu; fp64 goes to the reference. tiles: kernel -> BLOCK, columns a program, and launch options."""
    if gate_up.dtype == torch.float64 or gate_up.numel() == 0:
        return reference.swiglu(gate_up)
    return _SwiGLU.apply(gate_up, tiles)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, tiles):
        gate_up, tile = gate_up.contiguous(), tiles["forward"]
        size = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], size)
        triton_kernels.forward[_grid(y, tile)](gate_up, y, SIZE=size, **tile)
        ctx.tiles = tiles
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        (gate_up,), tile = ctx.saved_tensors, ctx.tiles["backward"]
        grad = torch.empty_like(gate_up)
        size = grad_y.shape[-1]
        triton_kernels.backward[_grid(grad_y, tile)](grad_y.contiguous(), gate_up, grad, SIZE=size, **tile)
        return grad, None


def _grid(y, tile):
    return y.numel() // y.shape[-1], triton.cdiv(y.shape[-1], tile["BLOCK"])
