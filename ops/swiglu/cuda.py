"""SwiGLU on NVIDIA GPUs: one pass forward, one pass backward. fp64 goes to the reference."""

from __future__ import annotations

import torch
import triton

from ops.swiglu import reference, triton_kernels

BLOCK = 1024


def swiglu(gate_up):
    """See ops.swiglu."""
    if gate_up.dtype == torch.float64 or gate_up.numel() == 0:
        return reference.swiglu(gate_up)
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        size = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], size)
        triton_kernels.forward[_grid(y)](gate_up, y, SIZE=size, BLOCK=BLOCK)
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        (gate_up,) = ctx.saved_tensors
        grad = torch.empty_like(gate_up)
        triton_kernels.backward[_grid(grad_y)](grad_y.contiguous(), gate_up, grad, SIZE=grad_y.shape[-1], BLOCK=BLOCK)
        return grad


def _grid(y):
    return y.numel() // y.shape[-1], triton.cdiv(y.shape[-1], BLOCK)
