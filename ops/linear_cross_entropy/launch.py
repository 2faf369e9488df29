"""The reference's walk over chunks with Triton kernels for the softmax and torch's matmuls; shared by the backends'
files."""

from __future__ import annotations

from typing import Mapping

import torch
import triton
from torch import Tensor

from ops.launch import Launcher, Prepared
from ops.linear_cross_entropy import reference, triton_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

HAS_FP32_OUTPUT = hasattr(torch.ops.aten.addmm, "dtype_out")
"""Whether a product of bf16 matrices can be added to an fp32 one without conversions: torch 2.8 and later."""


class Implementation:
    """ops.linear_cross_entropy with the tiles of a backend."""

    def __init__(self, backend: str):
        self.arithmetic = Kernels(Prepared("linear_cross_entropy", backend))

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.linear_cross_entropy

    def accepts(self, name: str, hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> str | None:
        """Why a call cannot run here; None when it can."""
        return None if hidden.dtype in DTYPES else "takes bf16, fp16 and fp32"

    def linear_cross_entropy(self, hidden, weight, labels, **options):
        """See ops.linear_cross_entropy."""
        return reference.losses(self.arithmetic, hidden, weight, labels, **options)


class Softmax:
    """The kernels for rows of `size` logits. launchers: all of them."""

    def __init__(self, size: int, entries: Mapping[str, Mapping]):
        self.statistics, self.gradient = (
            Launcher(getattr(triton_kernels, name), dict(SIZE=size), entries[name])
            for name in ("statistics", "gradient")
        )
        self.parts = triton.cdiv(size, entries["gradient"]["BLOCK"])
        self.launchers = [self.statistics, self.gradient]


class Kernels(reference.Arithmetic):
    """See reference.Arithmetic. Logits are rounded to hidden's dtype, as any matmul does; the softmax is fp32."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared

    def logits(self, hidden, weight):
        return hidden @ weight.to(hidden.dtype).T

    def statistics(self, logits, labels, num_valid):
        top, total, picked = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device).unbind()
        softmax = self.prepared(Softmax, logits.shape[1])
        softmax.statistics((len(logits),), logits, labels, top, total, picked, num_valid)
        return top, total, picked

    def gradient(self, logits, labels, lse, scale, num_valid):
        softmax = self.prepared(Softmax, logits.shape[1])
        grid = (len(logits), softmax.parts)
        softmax.gradient(grid, logits, labels, lse, scale.contiguous(), num_valid)
        return logits

    def hidden_gradient(self, grad_logits, weight, out):
        if out.dtype == weight.dtype == grad_logits.dtype:
            torch.mm(grad_logits, weight, out=out)
        elif grad_logits.is_cuda and HAS_FP32_OUTPUT and weight.dtype == grad_logits.dtype:
            torch.mm(grad_logits, weight, out_dtype=out.dtype, out=out)
        else:
            super().hidden_gradient(grad_logits, weight, out)

    def weight_gradient(self, grad_logits, hidden, total, *, scale, add):
        if grad_logits.is_cuda and HAS_FP32_OUTPUT and grad_logits.dtype != total.dtype:
            torch.addmm(total, grad_logits.T, hidden, out_dtype=total.dtype, beta=int(add), alpha=scale, out=total)
        else:
            super().weight_gradient(grad_logits, hidden, total, scale=scale, add=add)
