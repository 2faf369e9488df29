"""Attention on MetaX GPUs: the vendor's flash_attn for whole rows and documents, our Triton kernels for sinks and
log-sum-exps and where that package is missing.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ops import documents
from ops.attention import reference, windowed
from ops.tuning import tiles


def accepts(name, q, k, v, **options):
    """Why a call cannot run here; None when it can."""
    return windowed.refusal(q, v, largest_fp32=128)


def attention(q, k, v, *, window=None, cu_seqlens=None, sink_k=None, sink_v=None, scale=None, return_lse=False):
    """See ops.attention."""
    how = dict(sink_k=sink_k, sink_v=sink_v, scale=scale, return_lse=return_lse)
    if q.shape[1] == 0:
        return reference.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, **how)
    vendor = sink_k is None and not return_lse and q.dtype != torch.float32 and q.shape[3] == v.shape[3]
    if vendor and find_spec("flash_attn") is not None:
        return _vendor(q, k, v, window, cu_seqlens, scale)
    return windowed.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, **how, tiles=tiles("attention", "maca"))


def _vendor(q, k, v, window, cu_seqlens, scale):
    """flash_attn counts the keys to the left of the query, without itself."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    how = dict(softmax_scale=scale, causal=True, window_size=(-1 if window is None else window - 1, 0))
    how["deterministic"] = True
    if cu_seqlens is None:
        return flash_attn_func(q, k, v, **how)
    longest, edges = max(documents.lengths(cu_seqlens)), cu_seqlens.to(q.device)
    return flash_attn_varlen_func(q[0], k[0], v[0], edges, edges, longest, longest, **how)[None]
