"""Grouped matrix products on NVIDIA GPUs: torch's grouped GEMM for bf16 on Hopper and later, sizes in multiples of 8.

Triton kernels for other sizes and devices, fp16 and fp32 (as three tf32 products). None of them waits for the device to
learn the group sizes.
"""

from __future__ import annotations

import torch

from ops.grouped_mm.launch import Implementation

accepts, _grouped_mm = Implementation("cuda", precision="tf32x3").functions()


def grouped_mm(x, weight, *, offsets):
    """See ops.grouped_mm."""
    unaligned = x.shape[1] % 8 or weight.shape[1] % 8
    if x.dtype != torch.bfloat16 or unaligned or not len(x) or not _has_grouped_gemm(x):
        return _grouped_mm(x, weight, offsets=offsets)
    y = torch._grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=offsets[1:].to(torch.int32))
    return _ContiguousGradient.apply(y)


def _has_grouped_gemm(x) -> bool:
    """torch runs older devices group by group, waiting for the sizes."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


class _ContiguousGradient(torch.autograd.Function):
    """Identity: the grouped GEMM refuses an expanded upstream gradient."""

    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()
