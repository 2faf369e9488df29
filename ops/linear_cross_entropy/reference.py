"""Output layer and cross-entropy in plain torch, by chunks of tokens.

`losses` is the whole algorithm with the arithmetic on one chunk of logits left open (`Arithmetic`), so that other
backends bring their kernels and keep everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor


def linear_cross_entropy(hidden, weight, labels, *, loss_weights=None, ignore_index=-100, group=None, valid_vocab=None):
    """See ops.linear_cross_entropy."""
    if hidden.device.type == "cpu":
        _check_labels(labels, ignore_index, len(weight) * _num_ranks(group), valid_vocab)
    return losses(
        Arithmetic(),
        hidden,
        weight,
        labels,
        loss_weights=loss_weights,
        ignore_index=ignore_index,
        group=group,
        valid_vocab=valid_vocab,
    )


class Arithmetic:
    """What is done to one chunk of logits [R, V]. Columns at and after num_valid do not count.

    Labels are local column indices, -1 where the label is on another rank or ignored.
    """

    chunk_tokens = 1024

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [R, D] @ weight.T, fp32 or better."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(exact) @ weight.to(exact).T

    def statistics(self, logits: Tensor, labels: Tensor, num_valid: int) -> tuple[Tensor, Tensor, Tensor]:
        """(max [R], sum of exp(logit - max) [R], logit of the label or 0 [R]); max -inf and sum 0 without columns."""
        if num_valid == 0:
            nothing = logits.new_zeros(len(logits))
            return nothing - torch.inf, nothing, nothing
        valid = logits[:, :num_valid]
        top = valid.amax(-1)
        total = (valid - top[:, None]).exp_().sum(-1)
        picked = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return top, total, picked.where(labels >= 0, 0)

    def gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, num_valid: int) -> Tensor:
        """(softmax - one-hot of the label) * scale, [R, V]; may overwrite logits."""
        logits[:, num_valid:] = -torch.inf
        grad = logits.sub_(lse[:, None]).exp_()
        rows = (labels >= 0).nonzero()[:, 0]
        grad[rows, labels[rows]] -= 1
        return grad.mul_(scale[:, None])

    def add_weight_gradient(self, total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        """total [V, D] fp32 += grad_logits.T @ hidden."""
        total.addmm_(grad_logits.T.to(total.dtype), hidden.to(total.dtype))


@dataclass(frozen=True)
class _Problem:
    """All that is not a differentiable tensor. scale [T]: loss_weights, 0 where ignored."""

    arithmetic: Arithmetic
    labels: Tensor
    scale: Tensor
    group: Optional[dist.ProcessGroup]
    num_valid: int


def losses(arithmetic: Arithmetic, hidden, weight, labels, *, loss_weights, ignore_index, group, valid_vocab) -> Tensor:
    """The losses [T] with the given arithmetic; arguments as in ops.linear_cross_entropy."""
    num_local = len(weight)
    first = num_local * (dist.get_rank(group) if group is not None else 0)
    num_valid = num_local if valid_vocab is None else min(max(valid_vocab - first, 0), num_local)
    scored = labels != ignore_index
    exact = torch.promote_types(hidden.dtype, torch.float32)
    scale = scored.to(exact) if loss_weights is None else loss_weights.to(exact).where(scored, 0)
    local = torch.where(scored & (labels >= first) & (labels < first + num_local), labels - first, -1)
    problem = _Problem(arithmetic, local, scale.detach(), group, num_valid)
    if not torch.is_grad_enabled():  # needs_input_grad would still ask for gradients
        hidden, weight = hidden.detach(), weight.detach()
    return _Losses.apply(hidden, weight, problem)


class _Losses(torch.autograd.Function):
    """Losses [T]. Gradients for an upstream gradient of 1 are made along with them, while the logits exist."""

    @staticmethod
    def forward(ctx, hidden, weight, problem):
        ctx.problem = problem
        ctx.save_for_backward(hidden, weight)
        wanted = ctx.needs_input_grad[:2]
        loss, ctx.grad_hidden, ctx.grad_weight = _walk(hidden, weight, problem, problem.scale, wanted)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight = ctx.saved_tensors
        problem, grad_hidden, grad_weight = ctx.problem, ctx.grad_hidden, ctx.grad_weight
        if not _uniform(upstream):  # the sum over tokens must be made anew
            _, grad_hidden, grad_weight = _walk(
                hidden, weight, problem, problem.scale * upstream, ctx.needs_input_grad[:2]
            )
            upstream = upstream.new_ones(1)
        factor = upstream[:1]
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * factor).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * factor).to(weight.dtype)
        return grad_hidden, grad_weight, None


def _walk(hidden, weight, problem, grad_scale, wanted):
    """(losses [T], gradient of hidden summed over the group or None, fp32 gradient of weight or None), by chunks."""
    arithmetic, num_tokens = problem.arithmetic, len(hidden)
    loss = problem.scale.new_zeros(num_tokens)
    grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=loss.dtype) if wanted[1] else None
    for start in range(0, num_tokens, arithmetic.chunk_tokens):
        part = slice(start, start + arithmetic.chunk_tokens)
        labels = problem.labels[part]
        logits = arithmetic.logits(hidden[part], weight)
        top, total, picked = arithmetic.statistics(logits, labels, problem.num_valid)
        lse, picked = _over_group(top, total, picked, problem.group)
        loss[part] = (lse - picked).where(problem.scale[part] != 0, 0) * problem.scale[part]
        if not any(wanted):
            continue
        grad_logits = arithmetic.gradient(logits, labels, lse, grad_scale[part], problem.num_valid)
        if grad_hidden is not None:
            grad_hidden[part] = grad_logits @ weight.to(grad_logits.dtype)
        if grad_weight is not None:
            arithmetic.add_weight_gradient(grad_weight, grad_logits, hidden[part])
    if grad_hidden is not None and problem.group is not None:
        dist.all_reduce(grad_hidden, group=problem.group)
    return loss, grad_hidden, grad_weight


def _over_group(top, total, picked, group):
    """(log-sum-exp [R], label's logit [R]) over all ranks' columns."""
    if group is None:
        return top + total.log(), picked
    highest = top.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([total * (top - highest).exp(), picked])
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]


def _uniform(x):
    """Whether all elements are one number: an expanded scalar, as from a sum, is known without looking."""
    return x.stride(0) == 0 or bool((x == x[:1]).all())


def _num_ranks(group) -> int:
    return dist.get_world_size(group) if group is not None else 1


def _check_labels(labels, ignore_index, num_columns, valid_vocab):
    size = num_columns if valid_vocab is None else min(valid_vocab, num_columns)
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= size))]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is outside the vocabulary of {size}; check the tokenizer of the data")
