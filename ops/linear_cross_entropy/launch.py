"""The reference's walk over chunks with Triton kernels for the softmax and torch's matmuls; tiles are the caller's."""

from __future__ import annotations

from typing import Mapping

import torch
import triton

from ops.linear_cross_entropy import reference, triton_kernels

HAS_FP32_OUTPUT = hasattr(torch.ops.aten.addmm, "dtype_out")
"""Whether a product of bf16 matrices can be added to an fp32 one without conversions: torch 2.8 and later."""


class Kernels(reference.Arithmetic):
    """See reference.Arithmetic. Logits are rounded to hidden's dtype, as any matmul does; the softmax is fp32."""

    def __init__(self, tiles: Mapping[str, Mapping[str, int]]):
        """tiles: kernel -> tile sizes and launch options, as in cuda.py."""
        self.tiles = tiles

    def logits(self, hidden, weight):
        return hidden @ weight.to(hidden.dtype).T

    def statistics(self, logits, labels, num_valid):
        top, total, picked = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device).unbind()
        triton_kernels.statistics[(len(logits),)](
            logits, labels, top, total, picked, num_valid, SIZE=logits.shape[1], **self.tiles["statistics"]
        )
        return top, total, picked

    def gradient(self, logits, labels, lse, scale, num_valid):
        size, tile = logits.shape[1], self.tiles["gradient"]
        triton_kernels.gradient[(len(logits), triton.cdiv(size, tile["BLOCK"]))](
            logits, labels, lse, scale.contiguous(), num_valid, SIZE=size, **tile
        )
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
