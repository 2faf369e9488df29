"""Gated linear attention in plain torch: exact chunk form, and the CPU's training backend.

Inside a chunk of C tokens the decay from token j to token i > j is split at a token r between them:
exp(b_i - b_r) * exp(b_r - b_j), with b the running sum of log_decay. Both factors are <= 1 for any decay, so nothing
overflows, and what underflows is negligible. r is the last token of the lower half of the aligned block of 2h tokens
in which i and j fall into different halves; h = 1, 2, ..., C/2 covers every pair once, with plain matmuls.
A document that starts between j and i makes one of the factors exp(-inf), so packing costs nothing. In fp32 a factor
below exp(-43) = 2e-19 is taken as 0: smaller products would be denormal numbers, which slow a CPU down 5 times.

Shapes inside: q [B, H, M, C, G, K], k [B, H, M, C, K] with H key heads, G query heads of each, M chunks of C tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

from ops import chunks, documents

CHUNK_TOKENS = 64


def gla(q, k, v, log_decay, *, scale=None, initial_state=None, cu_seqlens=None, output_final_state=False):
    """See ops.gla."""
    dtype, tensors = q.dtype, _exact(q, k, v, log_decay, scale)
    state = None if initial_state is None else initial_state.to(tensors[0].dtype)
    stateful = initial_state is not None or output_final_state
    if stateful and cu_seqlens is not None and len(cu_seqlens) > 2:
        o, final = chunks.one_by_one(_rows, tensors, state, cu_seqlens)
    else:
        o, final = _rows(*tensors, state, chunks.packed_ids(cu_seqlens))
    return o.to(dtype), final if output_final_state else None


def gla_state(k, v, log_decay, *, cu_seqlens=None):
    """See ops.gla_state. The decay from token j to the end is a sum of log decays after j, <= 0: one matmul does it."""
    exact = torch.promote_types(k.dtype, torch.float32)
    start = documents.bounds(cu_seqlens)[-2] if cu_seqlens is not None else 0
    k, v, log_decay = (x[0, start:].to(exact).transpose(0, 1) for x in (k, v, log_decay))
    suffix = log_decay.flip(1).cumsum(1).flip(1)
    after = pad(suffix[:, 1:], (0, 0, 0, 1))[:, : k.shape[1]]
    state = (k * _exp(after)).mT @ v
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        return state, torch.full_like(state[:, :, 0], -torch.inf)
    return state, log_decay.sum(1)


def gla_output(q, k, v, log_decay, state_in, *, scale=None, cu_seqlens=None):
    """See ops.gla_output."""
    dtype, tensors = q.dtype, _exact(q, k, v, log_decay, scale)
    state = state_in.to(tensors[0].dtype)[None]
    if cu_seqlens is not None and documents.bounds(cu_seqlens)[1] == 0:
        state = torch.zeros_like(state)
    return _rows(*tensors, state, chunks.packed_ids(cu_seqlens))[0].to(dtype)


def _exact(q, k, v, log_decay, scale):
    """q scaled, k, v and log_decay in the dtype of the arithmetic."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return q.to(exact) * scale, k.to(exact), v.to(exact), log_decay.to(exact)


def _rows(q, k, v, log_decay, state, ids=None):
    """o [B, T, Hq, V] and final state [B, H, K, V] of rows; state enters at the first token, for its document."""
    num_rows, num_tokens, num_heads, key_size = k.shape
    if state is None:
        state = k.new_zeros(num_rows, num_heads, key_size, v.shape[-1])
    if num_tokens == 0:
        return v.new_zeros(num_rows, 0, q.shape[2], v.shape[-1]), state
    q = q.unflatten(2, (num_heads, -1)).transpose(1, 2)
    k, v, log_decay = (x.transpose(1, 2) for x in (k, v, log_decay))
    if num_tokens == 1:
        state = torch.addcmul(k.mT @ v, log_decay.exp().mT, state)
        return (q[:, :, 0] @ state).flatten(1, 2)[:, None], state
    (q, k, v, log_decay), ids = chunks.into_chunks((q, k, v, log_decay), ids, CHUNK_TOKENS)
    o, state = _chunks(q, k, v, log_decay, state, ids)
    return o.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2).flatten(2, 3), state


def _chunks(q, k, v, log_decay, state, ids):
    """o [B, H, M, C, G, V] and the state after the last chunk. ids [M, C] or None."""
    b = log_decay.cumsum(3)
    inside = _Scores.apply(q, k, b, ids)
    total = b[:, :, :, -1]
    enter, leave = b, total[:, :, :, None] - b
    if ids is not None:
        cuts = chunks.cut(ids)
        enter = enter.masked_fill(cuts.enter[..., None], -torch.inf)
        leave = leave.masked_fill(cuts.leave[..., None], -torch.inf)
        total = total.masked_fill(cuts.through[:, None], -torch.inf)
    added = (k * _exp(leave)).mT @ v
    entering = []
    for decay_c, added_c in zip(_exp(total)[..., None].unbind(2), added.unbind(2)):
        entering.append(state)
        state = torch.addcmul(added_c, decay_c, state)
    from_state = (q * _exp(enter)[:, :, :, :, None]).flatten(3, 4) @ torch.stack(entering, 2)
    o = inside.flatten(3, 4) @ v + from_state
    return o.unflatten(3, q.shape[3:5]), state


class _Scores(torch.autograd.Function):
    """(q_i * exp(b_i - b_j)) . k_j for j <= i of the same chunk and document, else 0: [B, H, M, C, G, C]."""

    @staticmethod
    def forward(ctx, q, k, b, ids):
        ctx.save_for_backward(q, k, b, ids)
        scores = q.new_zeros(*q.shape[:5], q.shape[3])
        scores.diagonal(0, 3, 5).copy_((q * k[:, :, :, :, None]).sum(-1).mT)
        for half in _halvings(q):
            q_grown, k_shrunk, _, _ = _factors(q, k, b, ids, half)
            _pairs(scores, half).copy_((q_grown.flatten(-3, -2) @ k_shrunk.mT).unflatten(-2, (half, -1)))
        return scores

    @staticmethod
    def backward(ctx, grad):
        """Gradients of q, k and b, halving by halving as in the forward pass."""
        q, k, b, ids = ctx.saved_tensors
        grad_q, grad_k = torch.zeros_like(q), torch.zeros_like(k)
        for half in _halvings(q):
            q_grown, k_shrunk, grow, shrink = _factors(q, k, b, ids, half)
            grad_pairs = _pairs(grad, half).flatten(-3, -2)
            to_q = (grad_pairs @ k_shrunk).view_as(q_grown)
            to_k = grad_pairs.mT @ q_grown.flatten(-3, -2)
            _upper(grad_q, half).addcmul_(to_q, grow[..., None, :])
            _lower(grad_k, half).addcmul_(to_k, shrink)
        # b_i enters only as q_i exp(b_i) and k_i exp(-b_i); on the diagonal the two cancel.
        grad_b = (q * grad_q).sum(-2).addcmul_(k, grad_k, value=-1)
        diagonal = grad.diagonal(0, 3, 5).mT[..., None]
        grad_q.addcmul_(diagonal, k[:, :, :, :, None])
        return grad_q, grad_k + (diagonal * q).sum(-2), grad_b, None


def _halvings(q: Tensor) -> list[int]:
    return [1 << n for n in range(q.shape[3].bit_length() - 1)]


def _lower(x: Tensor, half: int) -> Tensor:
    """Lower halves of the aligned blocks of 2 * half tokens: [B, H, M, C, ...] -> [B, H, M, C / 2h, h, ...]."""
    return x.unflatten(3, (-1, 2, half))[:, :, :, :, 0]


def _upper(x: Tensor, half: int) -> Tensor:
    return x.unflatten(3, (-1, 2, half))[:, :, :, :, 1]


def _pairs(scores: Tensor, half: int) -> Tensor:
    """View of the scores between upper-half rows and lower-half columns: [B, H, M, C / 2h, h, G, h]."""
    blocks = scores.unflatten(5, (-1, 2, half))[..., 0, :].unflatten(3, (-1, 2, half))[:, :, :, :, 1]
    return blocks.diagonal(0, 3, 6).movedim(-1, 3)


def _factors(q, k, b, ids, half):
    """q of the upper halves grown from r, k of the lower halves shrunk to r, and the two factors."""
    lower = _lower(b, half)
    middle = lower[..., -1:, :]
    grow, shrink = _upper(b, half) - middle, middle - lower
    if ids is not None:
        halves = ids.unflatten(1, (-1, 2, half))
        other = halves != halves[:, :, :1, -1:]
        shrink.masked_fill_(other[:, :, 0, :, None], -torch.inf)
        grow.masked_fill_(other[:, :, 1, :, None], -torch.inf)
    grow, shrink = _exp(grow), _exp(shrink)
    return _upper(q, half) * grow[..., None, :], _lower(k, half) * shrink, grow, shrink


def _exp(x: Tensor) -> Tensor:
    return (threshold(x, -43.0, -torch.inf) if x.dtype == torch.float32 else x).exp()
