"""Grouped matrix products with Triton, without waiting for the device; tiles are the caller's."""

from __future__ import annotations

from typing import Mapping

import torch
import triton

from ops.grouped_mm import triton_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_mm(x, weight, *, offsets, tiles: Mapping[str, Mapping[str, int]]):
    """See ops.grouped_mm: x and weight of one dtype of DTYPES, at least one row.

    tiles: kernel -> ROWS and COLS of the result and DEPTH of the sum a program holds, PRECISION of fp32 products,
    launch options.
    """
    return _GroupedMM.apply(x.contiguous(), weight, offsets.to(torch.int32).contiguous(), tiles)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets, tiles):
        ctx.tiles = tiles
        ctx.save_for_backward(x, weight, offsets)
        return _rows_product(x, weight, offsets, tiles["rows_product"])

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, offsets = ctx.saved_tensors
        grad_y, grad_x, grad_weight = grad_y.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = _rows_product(grad_y, weight.transpose(1, 2), offsets, ctx.tiles["rows_product"])
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad_y, weight, offsets, ctx.tiles["weight_gradient"])
        return grad_x, grad_weight, None, None


def _rows_product(x, weight, offsets, tile):
    num_groups, size_out, size_in = weight.shape
    y = x.new_empty(len(x), size_out)
    # every group may leave one tile of rows partly filled
    grid = (triton.cdiv(size_out, tile["COLS"]), triton.cdiv(len(x), tile["ROWS"]) + num_groups)
    triton_kernels.rows_product[grid](
        x,
        weight,
        y,
        offsets,
        num_groups,
        *weight.stride(),
        IN=size_in,
        OUT=size_out,
        GROUPS=triton.next_power_of_2(num_groups),
        **tile,
    )
    return y


def _weight_gradient(x, grad_y, weight, offsets, tile):
    num_groups, size_out, size_in = weight.shape
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grid = (triton.cdiv(size_in, tile["COLS"]), triton.cdiv(size_out, tile["ROWS"]), num_groups)
    triton_kernels.weight_gradient[grid](x, grad_y, grad_weight, offsets, IN=size_in, OUT=size_out, **tile)
    return grad_weight
