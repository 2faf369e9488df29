"""Mixture of block attention in plain torch: document by document, by blocks of queries."""

from __future__ import annotations

import torch

from ops import documents

BLOCK_TOKENS = 128


def moba(q, k, v, *, chunk_tokens, num_chunks, cu_seqlens=None, scale=None):
    """See ops.moba."""
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.to(exact).unflatten(2, (k.shape[2], -1)), k.to(exact), v.to(exact)
    bounds = [0, q.shape[1]] if cu_seqlens is None else documents.bounds(cu_seqlens)
    parts = [
        _document(*(x[:, a:b].transpose(1, 2) for x in (q, k, v)), chunk_tokens, num_chunks, scale)
        for a, b in zip(bounds, bounds[1:])
        if b > a
    ]
    return torch.cat(parts, 1).flatten(2, 3).to(dtype)


def _document(q, k, v, chunk_tokens, num_chunks, scale):
    """o [B, T, H, G, V] of one document a row; q [B, H, T, G, D], k [B, H, T, D], v [B, H, T, V]."""
    num_tokens = k.shape[2]
    chosen = _choose(q.detach(), k.detach(), chunk_tokens, num_chunks - 1)
    keys = torch.arange(num_tokens, device=q.device)
    outputs = []
    for start in range(0, num_tokens, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, num_tokens)
        queries = keys[start:end, None]
        own = (keys[:end] <= queries) & (keys[:end] // chunk_tokens == queries // chunk_tokens)
        seen = chosen[:, :, start:end].index_select(-1, keys[:end] // chunk_tokens) | own[:, None]
        scores = (q[:, :, start:end].flatten(2, 3) @ k[:, :, :end].mT * scale).view_as(seen)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append((weights.flatten(2, 3) @ v[:, :, :end]).unflatten(2, (end - start, -1)))
    return torch.cat(outputs, 2).transpose(1, 2)


def _choose(q, k, chunk_tokens, num_past):
    """bool [B, H, T, G, chunks]: past chunks that each query attends."""
    num_tokens = k.shape[2]
    num_full = num_tokens // chunk_tokens
    chosen = torch.zeros(*q.shape[:4], -(-num_tokens // chunk_tokens), dtype=torch.bool, device=q.device)
    if num_past == 0 or num_full == 0:
        return chosen
    means = k[:, :, : num_full * chunk_tokens].unflatten(2, (num_full, chunk_tokens)).mean(3)
    scores = (q.flatten(2, 3) @ means.mT).unflatten(2, q.shape[2:4])
    own = torch.arange(num_tokens, device=q.device)[:, None, None] // chunk_tokens
    future = torch.arange(num_full, device=q.device) >= own
    best = scores.masked_fill(future, -torch.inf).topk(min(num_past, num_full), -1).indices
    return chosen.scatter_(-1, best, True).logical_and_(torch.arange(chosen.shape[-1], device=q.device) < own)
