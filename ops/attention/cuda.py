"""Attention on NVIDIA GPUs: cuDNN through torch's SDPA for documents of one length without a window, and our Triton
kernels for windows, other documents, sinks and log-sum-exps (see windowed.py).

cuDNN takes bf16 and fp16; fp32 always runs on our kernels, without tf32. Other dtypes go to the reference.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ops import documents
from ops.attention import hopper, reference, windowed

TILES = {
    "outputs": dict(queries=128, keys=64, num_warps=8, num_stages=4, tma=True),
    "query_gradients": dict(queries=128, keys=64, num_warps=8, num_stages=3, tma=True),
    "key_gradients": dict(queries=64, keys=128, num_warps=8, num_stages=3, tma=True, num_programs=1024),
    "sink_gradients": dict(queries=64, keys=128, num_warps=8, num_stages=3, tma=True, num_parts=32),
}
_FP32 = dict(queries=16, keys=16, num_warps=4, num_stages=1)  # no tensor cores: operands are in registers
TILES_FP32 = {
    "outputs": _FP32,
    "query_gradients": dict(_FP32, num_warps=8),
    "key_gradients": dict(_FP32, num_programs=1024),
    "sink_gradients": dict(_FP32, num_parts=32),
}
TILES_OF = {torch.bfloat16: TILES, torch.float16: TILES, torch.float32: TILES_FP32}
LARGEST_HEAD = 256


def attention(q, k, v, *, window=None, cu_seqlens=None, sink_k=None, sink_v=None, scale=None, return_lse=False):
    """See ops.attention."""
    how = dict(sink_k=sink_k, sink_v=sink_v, scale=scale, return_lse=return_lse)
    num_tokens = q.shape[1]
    if q.dtype not in TILES_OF or num_tokens == 0 or max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        return reference.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, **how)
    lengths = [num_tokens] if cu_seqlens is None else documents.lengths(cu_seqlens)
    if window is not None and window >= max(lengths):
        window = None
    if len(lengths) == 1:
        cu_seqlens = None
    plain = window is None and len(set(lengths)) == 1 and sink_k is None and not return_lse
    if plain and q.dtype != torch.float32:
        return _dense(q, k, v, scale, length=lengths[0])
    how |= dict(tiles=TILES_OF[q.dtype], launch=hopper.Launch)
    return windowed.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, **how)


def _dense(q, k, v, scale, *, length: int):
    """Documents of one length are a batch."""
    rows = (x.reshape(-1, length, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        o = scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return o.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])
