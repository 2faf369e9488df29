"""RMSNorm with Triton: one pass forward, one pass backward; shared by the backends' files."""

from __future__ import annotations

from functools import cache
from typing import Mapping

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.launch import Launcher, Prepared
from ops.rms_norm import reference, triton_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Implementation:
    """ops.rms_norm with the tiles of a backend. largest_row: numbers; most_warps: of a program with a long row."""

    def __init__(self, backend: str, *, largest_row: int, most_warps: int):
        self.largest_row, self.most_warps = largest_row, most_warps
        self.prepared = Prepared("rms_norm", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.rms_norm

    def accepts(self, name: str, x: Tensor, weight: Tensor, **options) -> str | None:
        """Why a call cannot run here; None when it can."""
        if x.dtype not in DTYPES or weight.dtype not in DTYPES:
            return "takes bf16, fp16 and fp32"
        if x.shape[-1] > self.largest_row:
            return f"takes rows of up to {self.largest_row} numbers"
        return None

    def rms_norm(self, x, weight, *, eps, residual=None):
        """See ops.rms_norm."""
        if x.numel() == 0:
            return reference.rms_norm(x, weight, eps=eps, residual=residual)
        kernels = self.prepared(Kernels, x.shape[-1], self.most_warps)
        if residual is None:
            return _RMSNorm.apply(x, weight, float(eps), kernels)
        return _AddRMSNorm.apply(x, residual, weight, float(eps), kernels)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, kernels):
        ctx.kernels, x = kernels, x.contiguous()
        y, _, rstd = kernels.forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        return *ctx.kernels.backward(grad_y, None, *ctx.saved_tensors), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, kernels):
        ctx.kernels = kernels
        y, total, rstd = kernels.forward(x.contiguous(), residual.contiguous(), weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_total):
        if grad_y is None:
            return grad_total, grad_total, None, None, None
        grad_x, grad_weight = ctx.kernels.backward(grad_y, grad_total, *ctx.saved_tensors)
        return grad_x, grad_x, grad_weight, None, None


class Kernels:
    """The kernels for rows of one size. launchers: all of them."""

    def __init__(self, size: int, most_warps: int, entries: Mapping[str, Mapping]):
        tile, sums = _tile(size, entries["forward"], most_warps), entries["column_sums"]
        self.size, self.rows, self.sums_block = size, {"forward": tile["ROWS"]}, sums["BLOCK"]
        self._forward = [
            Launcher(triton_kernels.forward, dict(SIZE=size, HAS_RESIDUAL=flag), tile) for flag in (False, True)
        ]
        tile = _tile(size, entries["backward"], most_warps)
        self.rows["backward"], self.programs = tile["ROWS"], tile["PROGRAMS"]
        sizes = dict(SIZE=size, STAGES=tile["num_stages"])
        self._backward = [
            Launcher(triton_kernels.backward, {**sizes, "HAS_TOTAL": flag}, tile) for flag in (False, True)
        ]
        self._sums = Launcher(triton_kernels.column_sums, dict(SIZE=size), sums)
        self.launchers = [*self._forward, *self._backward, self._sums]

    def forward(self, x, residual, weight, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """(y, the sum that it is the norm of, rstd fp32 [rows]); the sum is x without a residual."""
        num_rows, has_residual = x.numel() // self.size, residual is not None
        y, rstd = torch.empty_like(x), torch.empty(num_rows, dtype=torch.float32, device=x.device)
        total = torch.empty_like(x) if has_residual else x
        grid = (triton.cdiv(num_rows, self.rows["forward"]),)
        inputs = (x, residual if has_residual else x, weight.contiguous())
        self._forward[has_residual](grid, *inputs, y, total, rstd, num_rows, eps)
        return y, total, rstd

    def backward(self, grad_y, grad_total, x, weight, rstd) -> tuple[Tensor, Tensor]:
        """(gradient of x, of weight). grad_total: of the sum, or None."""
        num_rows, has_total = len(rstd), grad_total is not None
        most_programs = self.programs * _num_multiprocessors(x.device)
        num_programs = min(triton.cdiv(num_rows, self.rows["backward"]), most_programs)
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        parts = torch.empty(num_programs, self.size, dtype=torch.float32, device=x.device)
        grad_y = grad_y.contiguous()
        gradients = (grad_y, grad_total.contiguous() if has_total else grad_y)
        self._backward[has_total]((num_programs,), *gradients, x, weight.contiguous(), rstd, grad_x, parts, num_rows)
        self._sums((triton.cdiv(self.size, self.sums_block),), parts, grad_weight, num_programs)
        return grad_x, grad_weight


def _tile(size: int, entry: Mapping, most_warps: int) -> dict:
    """The entry with ROWS and BLOCK for rows of this size.

    A program holds NUMBERS of each tensor, in rows of the next power of two; longer rows get as many more warps.
    """
    block, numbers = triton.next_power_of_2(size), entry["NUMBERS"]
    tile = {**entry, "ROWS": max(1, numbers // block), "BLOCK": block}
    if block > numbers:  # stages are held in shared memory, which long rows would fill
        tile |= {"num_warps": min(entry["num_warps"] * block // numbers, most_warps), "num_stages": 1}
    return tile


@cache
def _num_multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
