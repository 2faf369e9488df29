"""Grouped matrix products with Triton, without waiting for the device; shared by the backends' files."""

from __future__ import annotations

from typing import Mapping

import torch
import triton
from torch import Tensor

from ops.grouped_mm import reference, triton_kernels
from ops.launch import Launcher, Prepared

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Implementation:
    """ops.grouped_mm with the tiles of a backend. precision: of fp32 products, as tl.dot spells it."""

    def __init__(self, backend: str, *, precision: str):
        self.precision, self.prepared = precision, Prepared("grouped_mm", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.grouped_mm

    def accepts(self, name: str, x: Tensor, weight: Tensor, *, offsets: Tensor) -> str | None:
        """Why a call cannot run here; None when it can."""
        if x.dtype != weight.dtype:
            return "takes x and weight of one dtype"
        return None if x.dtype in DTYPES else "takes bf16, fp16 and fp32"

    def grouped_mm(self, x, weight, *, offsets):
        """See ops.grouped_mm."""
        if not len(x):
            return reference.grouped_mm(x, weight, offsets=offsets)
        kernels = self.prepared(Kernels, *weight.shape, self.precision)
        return _GroupedMM.apply(x.contiguous(), weight, offsets.to(torch.int32).contiguous(), kernels)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets, kernels):
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, offsets)
        return kernels.rows_product(x, weight, offsets)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, offsets = ctx.saved_tensors
        grad_y, grad_x, grad_weight = grad_y.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.kernels.rows_product(grad_y, weight.transpose(1, 2), offsets, back=True)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.kernels.weight_gradient(x, grad_y, weight, offsets)
        return grad_x, grad_weight, None, None


class Kernels:
    """The kernels for weights [E, F, D] of one shape. launchers: all of them."""

    def __init__(self, num_groups: int, size_out: int, size_in: int, precision: str, entries: Mapping[str, Mapping]):
        self.tiles, common = entries, dict(GROUPS=triton.next_power_of_2(num_groups), PRECISION=precision)
        self._rows_product = [
            Launcher(triton_kernels.rows_product, dict(IN=into, OUT=out, **common), entries["rows_product"])
            for into, out in ((size_in, size_out), (size_out, size_in))
        ]
        sizes = dict(IN=size_in, OUT=size_out, PRECISION=precision)
        self._weight_gradient = Launcher(triton_kernels.weight_gradient, sizes, entries["weight_gradient"])
        self.launchers = [*self._rows_product, self._weight_gradient]

    def rows_product(self, x, weight, offsets, *, back: bool = False) -> Tensor:
        """Rows of x times their group's weight [E, OUT, IN], transposed. back: the weights are a transposed view."""
        (num_groups, size_out, _), tile = weight.shape, self.tiles["rows_product"]
        y = x.new_empty(len(x), size_out)
        # every group may leave one tile of rows partly filled
        grid = (triton.cdiv(size_out, tile["COLS"]), triton.cdiv(len(x), tile["ROWS"]) + num_groups)
        self._rows_product[back](grid, x, weight, y, offsets, num_groups, *weight.stride())
        return y

    def weight_gradient(self, x, grad_y, weight, offsets) -> Tensor:
        """The gradient of weight [E, F, D]."""
        (num_groups, size_out, size_in), tile = weight.shape, self.tiles["weight_gradient"]
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        grid = (triton.cdiv(size_in, tile["COLS"]), triton.cdiv(size_out, tile["ROWS"]), num_groups)
        self._weight_gradient(grid, x, grad_y, grad_weight, offsets)
        return grad_weight
