"""RMSNorm on NVIDIA GPUs: one pass forward, one pass backward. fp64 and longer rows than 16384 go to the reference."""

from __future__ import annotations

import torch
import triton

from ops.rms_norm import reference, triton_kernels

MAX_SIZE = 16384
TILE_NUMBERS = 4096


def rms_norm(x, weight, *, eps):
    """See ops.rms_norm."""
    if x.dtype == torch.float64 or weight.dtype == torch.float64 or x.shape[-1] > MAX_SIZE or x.numel() == 0:
        return reference.rms_norm(x, weight, eps=eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        y = torch.empty_like(x)
        size = x.shape[-1]
        num_rows = x.numel() // size
        rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        tile, options = _tile(size)
        triton_kernels.forward[(triton.cdiv(num_rows, tile["ROWS"]),)](
            x, weight, y, rstd, num_rows, eps, SIZE=size, **tile, **options
        )
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, rstd = ctx.saved_tensors
        size, num_rows = x.shape[-1], len(rstd)
        tile, options = _tile(size)
        num_programs = min(triton.cdiv(num_rows, tile["ROWS"]), 4 * _num_multiprocessors(x))
        grad_x = torch.empty_like(x)
        grad_weight = torch.empty(num_programs, size, dtype=torch.float32, device=x.device)
        triton_kernels.backward[(num_programs,)](
            grad_y.contiguous(), x, weight, rstd, grad_x, grad_weight, num_rows, SIZE=size, **tile, **options
        )
        return grad_x, grad_weight.sum(0).to(weight.dtype), None


def _tile(size):
    """Rows and columns of a program, and its warps: about TILE_NUMBERS numbers in registers."""
    block = triton.next_power_of_2(size)
    return {"ROWS": max(1, TILE_NUMBERS // block), "BLOCK": block}, {"num_warps": 4 if block <= 2048 else 8}


def _num_multiprocessors(x):
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
