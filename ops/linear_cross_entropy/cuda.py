"""Output layer and cross-entropy on NVIDIA GPUs: the reference's walk over chunks, with kernels for the softmax.

Logits are rounded to hidden's dtype, as any bf16 matmul does; the softmax over them is fp32. The weight's gradient is
accumulated in fp32 by the matmul itself. fp64 goes to the reference.
"""

from __future__ import annotations

import torch
import triton

from ops.linear_cross_entropy import reference, triton_kernels

BLOCK = 4096


def linear_cross_entropy(hidden, weight, labels, *, loss_weights=None, ignore_index=-100, group=None, valid_vocab=None):
    """See ops.linear_cross_entropy."""
    arithmetic = reference.Arithmetic() if hidden.dtype == torch.float64 else Kernels()
    return reference.losses(
        arithmetic,
        hidden,
        weight,
        labels,
        loss_weights=loss_weights,
        ignore_index=ignore_index,
        group=group,
        valid_vocab=valid_vocab,
    )


class Kernels(reference.Arithmetic):
    """See reference.Arithmetic. 4096 tokens a chunk: fewer would be bound by the reads and writes of the gradient."""

    chunk_tokens = 4096

    def logits(self, hidden, weight):
        return hidden @ weight.to(hidden.dtype).T

    def statistics(self, logits, labels, num_valid):
        top, total, picked = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device).unbind()
        triton_kernels.statistics[(len(logits),)](
            logits, labels, top, total, picked, num_valid, SIZE=logits.shape[1], BLOCK=BLOCK, num_warps=8
        )
        return top, total, picked

    def gradient(self, logits, labels, lse, scale, num_valid):
        size = logits.shape[1]
        triton_kernels.gradient[(len(logits), triton.cdiv(size, BLOCK))](
            logits, labels, lse, scale.contiguous(), num_valid, SIZE=size, BLOCK=BLOCK, num_warps=8
        )
        return logits

    def add_weight_gradient(self, total, grad_logits, hidden):
        if grad_logits.is_cuda and grad_logits.dtype != total.dtype:
            torch.addmm(total, grad_logits.T, hidden, out_dtype=total.dtype, out=total)
        else:
            super().add_weight_gradient(total, grad_logits, hidden)
