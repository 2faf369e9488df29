"""RMSNorm with Triton: one pass forward, one pass backward; tiles are the caller's."""

from __future__ import annotations

from typing import Mapping

import torch
import triton

from ops.rms_norm import reference, triton_kernels


def rms_norm(x, weight, *, eps, residual, tiles: Mapping[str, Mapping[str, int]], most_columns: int):
    """See ops.rms_norm. fp64, no rows, and rows longer than most_columns go to the reference.

    tiles: kernel -> launch options and, of forward and backward, NUMBERS: what a program holds of each tensor, in rows
    of the next power of two (longer rows get as many more warps); of backward, PROGRAMS per multiprocessor.
    """
    if torch.float64 in (x.dtype, weight.dtype) or x.shape[-1] > most_columns or x.numel() == 0:
        return reference.rms_norm(x, weight, eps=eps, residual=residual)
    if residual is None:
        return _RMSNorm.apply(x, weight, eps, tiles)
    return _AddRMSNorm.apply(x, residual, weight, eps, tiles)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, tiles):
        ctx.tiles, x = tiles, x.contiguous()
        y, rstd = _forward(x, None, None, weight, eps, tiles["forward"])
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return *_backward(grad_y, None, *ctx.saved_tensors, ctx.tiles), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, tiles):
        ctx.tiles, x = tiles, x.contiguous()
        total = torch.empty_like(x)
        y, rstd = _forward(x, residual.contiguous(), total, weight, eps, tiles["forward"])
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, grad_y, grad_total):
        if grad_y is None:
            return grad_total, grad_total, None, None, None
        grad_x, grad_weight = _backward(grad_y, grad_total, *ctx.saved_tensors, ctx.tiles)
        return grad_x, grad_x, grad_weight, None, None


def _forward(x, residual, total, weight, eps, tile):
    size = x.shape[-1]
    num_rows = x.numel() // size
    y, rstd = torch.empty_like(x), torch.empty(num_rows, dtype=torch.float32, device=x.device)
    shape, options = _tile(size, **tile)
    triton_kernels.forward[(triton.cdiv(num_rows, shape["ROWS"]),)](
        x,
        residual,
        weight.contiguous(),
        y,
        total,
        rstd,
        num_rows,
        eps,
        SIZE=size,
        HAS_RESIDUAL=residual is not None,
        **shape,
        **options,
    )
    return y, rstd


def _backward(grad_y, grad_total, x, weight, rstd, tiles):
    """(gradient of x, of weight)."""
    size, num_rows = x.shape[-1], len(rstd)
    tile = dict(tiles["backward"])
    most_programs = tile.pop("PROGRAMS") * _num_multiprocessors(x)
    shape, options = _tile(size, **tile)
    num_programs = min(triton.cdiv(num_rows, shape["ROWS"]), most_programs)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    parts = torch.empty(num_programs, size, dtype=torch.float32, device=x.device)
    triton_kernels.backward[(num_programs,)](
        grad_y.contiguous(),
        None if grad_total is None else grad_total.contiguous(),
        x,
        weight.contiguous(),
        rstd,
        grad_x,
        parts,
        num_rows,
        SIZE=size,
        HAS_TOTAL=grad_total is not None,
        STAGES=options["num_stages"],
        **shape,
        **options,
    )
    sums = tiles["column_sums"]
    triton_kernels.column_sums[(triton.cdiv(size, sums["BLOCK"]),)](parts, grad_weight, num_programs, SIZE=size, **sums)
    return grad_x, grad_weight


def _tile(size, *, NUMBERS, num_warps, num_stages):
    """({ROWS, BLOCK}, launch options) for rows of this size."""
    block = triton.next_power_of_2(size)
    shape = {"ROWS": max(1, NUMBERS // block), "BLOCK": block}
    if block > NUMBERS:  # stages are held in shared memory, which long rows would fill
        return shape, {"num_warps": min(num_warps * block // NUMBERS, 32), "num_stages": 1}
    return shape, {"num_warps": num_warps, "num_stages": num_stages}


def _num_multiprocessors(x):
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
