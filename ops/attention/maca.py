"""Attention on MetaX GPUs: the vendor's flash_attn for whole rows and documents, our Triton kernels for sinks and
log-sum-exps and where that package is missing.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from bisect import bisect_right
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
    """flash_attn counts the keys to the left of the query, without itself; fewer queries than keys are the last ones
    there too, since its 2.1."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    how = dict(softmax_scale=scale, causal=True, window_size=(-1 if window is None else window - 1, 0))
    how["deterministic"] = True
    if cu_seqlens is None:
        return flash_attn_func(q, k, v, **how)
    start, *sizes = _of_queries(cu_seqlens, q.shape[1], q.device)
    return flash_attn_varlen_func(q[0], k[0, start:], v[0, start:], *sizes, **how)[None]


def _of_queries(cu_seqlens, num_queries: int, device):
    """(first token, edges of queries, edges of keys, most queries, most keys) of the documents that have queries."""

    def build():
        edges = documents.bounds(cu_seqlens)
        ahead = edges[-1] - num_queries
        edges = edges[bisect_right(edges, ahead) - 1 :]
        both = [max(edge - ahead, 0) for edge in edges], [edge - edges[0] for edge in edges]
        most = [max(end - start for start, end in zip(x, x[1:])) for x in both]
        return edges[0], *(torch.tensor(x, dtype=torch.int32, device=device) for x in both), *most

    return documents.derived(cu_seqlens, ("attention_of_queries", num_queries, device), build)
