"""Output layer and cross-entropy in one: the loss of every token without ever holding all logits.

The vocabulary may be split over a process group. The softmax is fp32, and so are the sums of the gradients of weight
(over tokens) and hidden (over the vocabulary and the group). Source: Megatron-LM's vocabulary-parallel cross-entropy
(Shoeybi et al., 2019); chunking as in Cut Your Losses (Wijmans et al., 2024). Tolerances against float64, relative norm
of losses and gradients: fp32 1e-5, bf16 1e-2.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ops.gradient_buffer import GradientBuffer
from ops.registry import implementation

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss_weights: Optional[Tensor] = None,
    ignore_index: int = -100,
    group: Optional[ProcessGroup] = None,
    valid_vocab: Optional[int] = None,
    weight_grad: Optional[GradientBuffer] = None,
) -> Tensor:
    """Loss of each token, fp32 [T] (fp64 for fp64 inputs): -log softmax(hidden @ weight.T)[label] * loss_weights.

    hidden [T, D], the same on every rank of `group`; weight [V / ranks, D], rank r of the group holding rows
    r * V / ranks onward; labels int64 [T], global ids, ignore_index where nothing is predicted (loss and gradient 0).
    loss_weights [T] floating. Columns whose global id is >= valid_vocab (padding) never get probability.

    Gradients go to hidden and weight. **The gradient of hidden is already summed over the group**, so whatever made
    hidden must not sum it again (under Megatron's sequence parallelism gather with tensor_parallel_output_grad=False).
    The gradients are computed with the losses; a backward pass that weights tokens differently (anything but a scaled
    sum or mean of the result) computes the logits once more. Collectives run inside, so all ranks must call alike.

    weight_grad: takes the gradient of weight, which then gets none from autograd. The products are added to it in
    fp32 in the forward pass, already scaled: see ops.gradient_buffer for what that asks of the caller. A backward pass
    that brings another gradient than weight_grad.scale for any token fails. Not used without gradients of both hidden
    and weight to compute; weight then gets its gradient from autograd, if any.

    Raises ValueError on shapes and dtypes that do not fit and, on CPU, on labels outside the vocabulary.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = ", ".join(str(list(x.shape)) for x in (hidden, weight, labels))
        raise ValueError(f"hidden, weight, labels must be [T, D], [V, D], [T]; got {shapes}")
    if loss_weights is not None and loss_weights.shape != labels.shape:
        raise ValueError(f"loss_weights must be [T] like labels {list(labels.shape)}, got {list(loss_weights.shape)}")
    if weight_grad is not None:
        _check_buffer(weight_grad.total, weight, torch.promote_types(hidden.dtype, torch.float32))
    run = implementation("linear_cross_entropy", "linear_cross_entropy", hidden)
    return run(
        hidden,
        weight,
        labels,
        loss_weights=loss_weights,
        ignore_index=ignore_index,
        group=group,
        valid_vocab=valid_vocab,
        weight_grad=weight_grad,
    )


def _check_buffer(total: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    if total.shape != weight.shape or total.dtype != dtype or not total.is_contiguous():
        raise ValueError(
            f"weight_grad.total must be contiguous {dtype} {list(weight.shape)} like weight, "
            f"got {total.dtype} {list(total.shape)}"
        )
