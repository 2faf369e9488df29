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

from ops.gradient_buffer import GradientBuffer

ROUND_TOKENS = 256


def linear_cross_entropy(hidden, weight, labels, *, ignore_index=-100, group=None, valid_vocab=None, **options):
    """See ops.linear_cross_entropy."""
    if hidden.device.type == "cpu":
        _check_labels(labels, ignore_index, len(weight) * _num_ranks(group), valid_vocab)
    options |= dict(ignore_index=ignore_index, group=group, valid_vocab=valid_vocab)
    return losses(Arithmetic(), hidden, weight, labels, **options)


class Arithmetic:
    """What is done to one chunk of logits [R, V]. Columns at and after num_valid do not count.

    Labels are local column indices, -1 where the label is on another rank or ignored.
    """

    def chunk_tokens(self, weight: Tensor) -> int:
        """Most tokens of a chunk. As many as weight has columns make logits as large as weight; or 2^27 logits.

        Fewer would save little memory beside the gradient of weight, and each chunk reads and writes that gradient.
        """
        return max(weight.shape[1], 2**27 // max(len(weight), 1), ROUND_TOKENS)

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

    def hidden_gradient(self, grad_logits: Tensor, weight: Tensor, out: Tensor) -> None:
        """out [R, D] = grad_logits @ weight."""
        out.copy_(grad_logits @ weight.to(grad_logits.dtype))

    def weight_gradient(self, grad_logits: Tensor, hidden: Tensor, total: Tensor, *, scale: float, add: bool) -> None:
        """total [V, D] fp32 = scale * grad_logits.T @ hidden, plus what it held if add."""
        total.addmm_(grad_logits.T.to(total.dtype), hidden.to(total.dtype), beta=int(add), alpha=scale)


@dataclass(frozen=True)
class _Problem:
    """All that is not a differentiable tensor. scale [T]: loss_weights, 0 where ignored."""

    arithmetic: Arithmetic
    labels: Tensor
    scale: Tensor
    group: Optional[dist.ProcessGroup]
    num_valid: int
    weight_grad: Optional[GradientBuffer]


def losses(
    arithmetic: Arithmetic,
    hidden,
    weight,
    labels,
    *,
    loss_weights=None,
    ignore_index=-100,
    group=None,
    valid_vocab=None,
    weight_grad=None,
) -> Tensor:
    """The losses [T] with the given arithmetic; arguments as in ops.linear_cross_entropy."""
    num_local = len(weight)
    first = num_local * (dist.get_rank(group) if group is not None else 0)
    num_valid = num_local if valid_vocab is None else min(max(valid_vocab - first, 0), num_local)
    scored = labels != ignore_index
    exact = torch.promote_types(hidden.dtype, torch.float32)
    scale = scored.to(exact) if loss_weights is None else loss_weights.to(exact).where(scored, 0)
    local = torch.where(scored & (labels >= first) & (labels < first + num_local), labels - first, -1)
    if not torch.is_grad_enabled():  # needs_input_grad would still ask for gradients
        hidden, weight = hidden.detach(), weight.detach()
    if weight_grad is not None and hidden.requires_grad and weight.requires_grad:
        weight = weight.detach()
    else:
        weight_grad = None
    problem = _Problem(arithmetic, local, scale.detach(), group, num_valid, weight_grad)
    return _Losses.apply(hidden, weight, problem)


class _Losses(torch.autograd.Function):
    """Losses [T]. Gradients for an upstream gradient of 1 are made along with them, while the logits exist.

    The first backward pass scales them in place and lets go of them; another one makes them anew.
    """

    @staticmethod
    def forward(ctx, hidden, weight, problem):
        """The losses, and beside them the gradients for equal upstream ones, which a mean or a sum has."""
        ctx.problem, given = problem, problem.weight_grad
        ctx.save_for_backward(hidden, weight)
        total, scale, add = None, 1.0, False
        if given is not None:
            total, scale, add = given.total, given.scale, given.begin()
        elif ctx.needs_input_grad[1]:
            total = torch.empty_like(weight, dtype=problem.scale.dtype)
        loss, grad_hidden = _walk(
            hidden, weight, problem, problem.scale, ctx.needs_input_grad[0], total, scale=scale, add=add
        )
        ctx.gradients = grad_hidden, total if given is None else None
        return loss

    @staticmethod
    def backward(ctx, upstream):
        """Gradients of hidden and weight, kept from the forward pass or computed now."""
        (hidden, weight), problem = ctx.saved_tensors, ctx.problem
        gradients, ctx.gradients = ctx.gradients, None
        if problem.weight_grad is not None:
            if gradients is None:
                raise RuntimeError("linear_cross_entropy with weight_grad allows one backward pass")
            _demand(upstream, problem.weight_grad.scale)
            problem.weight_grad.finish()
        elif gradients is None or not _uniform(upstream):  # the sum over tokens must be made anew
            gradients = None
            total = torch.empty_like(weight, dtype=problem.scale.dtype) if ctx.needs_input_grad[1] else None
            scale, upstream = problem.scale * upstream, torch.ones_like(upstream)
            gradients = _walk(hidden, weight, problem, scale, ctx.needs_input_grad[0], total)[1], total
        grad_hidden, grad_weight = gradients
        return _times(grad_hidden, upstream, hidden.dtype), _times(grad_weight, upstream, weight.dtype), None


def _walk(hidden, weight, problem, grad_scale, hidden_wanted, total, *, scale=1.0, add=False):
    """(losses [T], gradient of hidden summed over the group or None), by chunks.

    total [V, D] or None: receives scale times the gradient of weight, plus what it held if add.
    """
    arithmetic, num_tokens = problem.arithmetic, len(hidden)
    loss = problem.scale.new_zeros(num_tokens)
    grad_hidden = None
    if hidden_wanted:
        grad_hidden = torch.empty_like(hidden, dtype=hidden.dtype if problem.group is None else loss.dtype)
    for part in _parts(num_tokens, arithmetic.chunk_tokens(weight)):
        labels = problem.labels[part]
        logits = arithmetic.logits(hidden[part], weight)
        top, summed, picked = arithmetic.statistics(logits, labels, problem.num_valid)
        lse, picked = _over_group(top, summed, picked, problem.group)
        loss[part] = (lse - picked).where(problem.scale[part] != 0, 0) * problem.scale[part]
        if grad_hidden is not None or total is not None:
            logits = arithmetic.gradient(logits, labels, lse, grad_scale[part], problem.num_valid)
        if grad_hidden is not None:
            arithmetic.hidden_gradient(logits, weight, grad_hidden[part])
        if total is not None:
            arithmetic.weight_gradient(logits, hidden[part], total, scale=scale, add=add)
            add = True
        del logits  # or the next chunk's would lie beside them
    if total is not None and not add:
        total.zero_()
    if grad_hidden is not None and problem.group is not None:
        dist.all_reduce(grad_hidden, group=problem.group)
    return loss, grad_hidden


def _parts(num_tokens: int, most_tokens: int) -> list[slice]:
    """Slices of nearly equal lengths, none longer than most_tokens."""
    if num_tokens == 0:
        return []
    size = -(-num_tokens // -(-num_tokens // most_tokens))
    size = min(-(-size // ROUND_TOKENS) * ROUND_TOKENS, most_tokens)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _over_group(top, total, picked, group):
    """(log-sum-exp [R], label's logit [R]) over all ranks' columns."""
    if group is None:
        return top + total.log(), picked
    highest = top.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([total * (top - highest).exp(), picked])
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]


def _times(grad, upstream, dtype):
    """grad times the one number in upstream [T], rounded once to dtype; in place where it has it. None for None."""
    if grad is None:
        return None
    result = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    return torch.mul(grad, upstream[:1], out=result) if len(upstream) else result.zero_()


def _uniform(x):
    """Whether all elements are one number: an expanded scalar, as from a sum, is known without looking."""
    return x.stride(0) == 0 or bool((x == x[:1]).all())


def _demand(upstream, scale):
    """Fail unless the gradient of every loss is scale; the host does not wait for the answer."""
    same = ((upstream - scale).abs() <= 1e-6 * abs(scale)).all()
    torch._assert_async(same, f"linear_cross_entropy: the gradient of a loss is not weight_grad.scale = {scale}")


def _num_ranks(group) -> int:
    return dist.get_world_size(group) if group is not None else 1


def _check_labels(labels, ignore_index, num_columns, valid_vocab):
    size = num_columns if valid_vocab is None else min(valid_vocab, num_columns)
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= size))]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is outside the vocabulary of {size}; check the tokenizer of the data")
