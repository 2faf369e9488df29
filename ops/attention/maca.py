"""Attention on MetaX GPUs: the vendor's flash_attn for whole rows and documents, our Triton kernels for sinks and
log-sum-exps and where that package is missing.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware. The tiles
are borrowed from what others report of attention there: one stage, since 64 KB of shared memory is what runs out.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ops import documents
from ops.attention import reference, windowed

_TILE = dict(queries=64, keys=32, num_warps=4, num_stages=1)
_KEY_TILE = dict(queries=32, keys=32, num_warps=4, num_stages=1)
TILES = {
    "outputs": _TILE,
    "query_gradients": _TILE,
    "key_gradients": dict(_KEY_TILE, num_programs=208),  # two for each of the 104 multiprocessors
    "sink_gradients": dict(_KEY_TILE, num_parts=26),
}
_FP32 = dict(queries=16, keys=16, num_warps=4, num_stages=1)  # larger ones do not fit 4 KB of private memory
TILES_FP32 = {
    "outputs": _FP32,
    "query_gradients": dict(_FP32, num_warps=8),
    "key_gradients": dict(_FP32, num_programs=208),
    "sink_gradients": dict(_FP32, num_parts=26),
}
TILES_OF = {torch.bfloat16: TILES, torch.float16: TILES, torch.float32: TILES_FP32}
LARGEST_HEAD = 256


def attention(q, k, v, *, window=None, cu_seqlens=None, sink_k=None, sink_v=None, scale=None, return_lse=False):
    """See ops.attention."""
    how = dict(sink_k=sink_k, sink_v=sink_v, scale=scale, return_lse=return_lse)
    if q.dtype not in TILES_OF or q.shape[1] == 0 or max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        return reference.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, **how)
    vendor = sink_k is None and not return_lse and q.dtype != torch.float32 and q.shape[3] == v.shape[3]
    if vendor and find_spec("flash_attn") is not None:
        return _vendor(q, k, v, window, cu_seqlens, scale)
    return windowed.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, **how, tiles=TILES_OF[q.dtype])


def _vendor(q, k, v, window, cu_seqlens, scale):
    """flash_attn counts the keys to the left of the query, without itself."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    how = dict(softmax_scale=scale, causal=True, window_size=(-1 if window is None else window - 1, 0))
    how["deterministic"] = True
    if cu_seqlens is None:
        return flash_attn_func(q, k, v, **how)
    longest, edges = max(documents.lengths(cu_seqlens)), cu_seqlens.to(q.device)
    return flash_attn_varlen_func(q[0], k[0], v[0], edges, edges, longest, longest, **how)[None]
