"""Attention in plain torch, by blocks of queries against the keys that a block can see; the CPU's training backend.

Scores exist for one block at a time, in the backward pass too (they are computed again from the saved log-sum-exp).
Shapes inside: q [B, H, Q, G, D], k [B, H, T, D], v [B, H, T, V] with G query heads of each of H key heads. The queries,
of the last Q tokens, count from 0.
"""

from __future__ import annotations

import torch

from ops import documents

BLOCK_TOKENS = 128


def attention(q, k, v, *, window=None, cu_seqlens=None, sink_k=None, sink_v=None, scale=None, return_lse=False):
    """See ops.attention."""
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_heads = k.shape[2]
    first = documents.first_visible(cu_seqlens, window, num_tokens=k.shape[1], device=q.device)[
        k.shape[1] - q.shape[1] :
    ]
    q = (q.to(exact) * scale).unflatten(2, (num_heads, -1)).transpose(1, 2).contiguous()
    k, v = (x.to(exact).transpose(1, 2).contiguous() for x in (k, v))
    if sink_k is None:
        sink_k, sink_v = k.new_zeros(num_heads, 0, k.shape[-1]), v.new_zeros(num_heads, 0, v.shape[-1])
    else:
        sink_k, sink_v = (x.to(exact).transpose(0, 1) for x in (sink_k, sink_v))
    o, lse = _Blocks.apply(q, k, v, sink_k, sink_v, first)
    o, lse = o.transpose(1, 2).flatten(2, 3).to(dtype), lse.transpose(1, 2).flatten(2, 3)
    return (o, lse) if return_lse else o


class _Blocks(torch.autograd.Function):
    """(o [B, H, Q, G, V], lse [B, H, Q, G]). first int64 [Q]: first key that each query sees, non-decreasing."""

    @staticmethod
    def forward(ctx, q, k, v, sink_k, sink_v, first):
        o = q.new_empty(*q.shape[:4], v.shape[-1])
        lse = q.new_empty(q.shape[:4])
        for rows, keys, hidden in _blocks(first, k.shape[2]):
            k_seen, v_seen = _with_sinks(sink_k, k, keys), _with_sinks(sink_v, v, keys)
            scores = _scores(q[:, :, rows], k_seen, hidden)
            lse_rows = scores.logsumexp(-1, keepdim=True)
            o[:, :, rows] = (scores.sub_(lse_rows).exp_() @ v_seen).view_as(o[:, :, rows])
            lse[:, :, rows] = lse_rows.view_as(lse[:, :, rows])
        ctx.save_for_backward(q, k, v, sink_k, sink_v, first, o, lse)
        return o, lse

    @staticmethod
    def backward(ctx, grad_o, grad_lse):
        """Gradients of q, k, v and the sinks, from probabilities computed again out of lse."""
        q, k, v, sink_k, sink_v, first, o, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_sink_k, grad_sink_v = torch.zeros_like(sink_k), torch.zeros_like(sink_v)
        shift = (grad_o * o).sum(-1) - grad_lse
        num_sinks = sink_k.shape[1]
        for rows, keys, hidden in _blocks(first, k.shape[2]):
            q_rows, k_seen, v_seen = q[:, :, rows], _with_sinks(sink_k, k, keys), _with_sinks(sink_v, v, keys)
            weights = _scores(q_rows, k_seen, hidden).sub_(lse[:, :, rows].flatten(2, 3)[..., None]).exp_()
            grad_rows = grad_o[:, :, rows].flatten(2, 3)
            from_v = weights.mT @ grad_rows
            grad_scores = (grad_rows @ v_seen.mT).sub_(shift[:, :, rows].flatten(2, 3)[..., None]).mul_(weights)
            grad_q[:, :, rows] = (grad_scores @ k_seen).view_as(q_rows)
            from_k = grad_scores.mT @ q_rows.flatten(2, 3)
            grad_k[:, :, keys] += from_k[:, :, num_sinks:]
            grad_v[:, :, keys] += from_v[:, :, num_sinks:]
            grad_sink_k += from_k[:, :, :num_sinks].sum(0)
            grad_sink_v += from_v[:, :, :num_sinks].sum(0)
        return grad_q, grad_k, grad_v, grad_sink_k, grad_sink_v, None


def _blocks(first, num_tokens):
    """(query rows, keys that any of them sees, bool [rows, 1, keys]: hidden from that row) of each block."""
    num_queries, ahead = len(first), num_tokens - len(first)
    starts = first[::BLOCK_TOKENS].tolist()
    for start, left in zip(range(0, num_queries, BLOCK_TOKENS), starts):
        end = min(start + BLOCK_TOKENS, num_queries)
        keys = torch.arange(left, ahead + end, device=first.device)
        own = torch.arange(ahead + start, ahead + end, device=first.device)[:, None]
        hidden = (keys > own) | (keys < first[start:end, None])
        yield slice(start, end), slice(left, ahead + end), hidden[:, None]


def _with_sinks(sinks, x, keys):
    seen = x[:, :, keys]
    return torch.cat([sinks.expand(len(x), -1, -1, -1), seen], 2) if sinks.shape[1] else seen


def _scores(q_rows, k_seen, hidden):
    """Scores [B, H, rows * G, sinks + keys], -inf where hidden."""
    scores = q_rows.flatten(2, 3) @ k_seen.mT
    num_sinks = k_seen.shape[2] - hidden.shape[-1]
    scores.unflatten(2, (len(hidden), -1))[..., num_sinks:].masked_fill_(hidden, -torch.inf)
    return scores
