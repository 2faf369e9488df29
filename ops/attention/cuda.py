"""Attention on NVIDIA GPUs: cuDNN through torch's SDPA for documents of one length without a window, and our kernels
for windows, other documents, fewer queries than keys, sinks and log-sum-exps (see windowed.py and, for Hopper,
hopper.py).

cuDNN takes bf16 and fp16; fp32 always runs on our kernels, without tf32. The backward pass of cuDNN gives other bits
every time: under torch.use_deterministic_algorithms(True) our kernels do its part.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ops import documents
from ops.attention import hopper, reference, windowed
from ops.tuning import tiles


def accepts(name, q, k, v, **options):
    """Why a call cannot run here; None when it can."""
    return windowed.refusal(q, v)


def attention(q, k, v, *, window=None, cu_seqlens=None, sink_k=None, sink_v=None, scale=None, return_lse=False):
    """See ops.attention."""
    how = dict(sink_k=sink_k, sink_v=sink_v, scale=scale, return_lse=return_lse)
    num_queries, num_tokens = q.shape[1], k.shape[1]
    if num_queries == 0:
        return reference.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, **how)
    lengths = [num_tokens] if cu_seqlens is None else documents.lengths(cu_seqlens)
    if window is not None and window >= max(lengths):
        window = None
    if len(lengths) == 1:
        cu_seqlens = None
    plain = window is None and len(set(lengths)) == 1 and sink_k is None and not return_lse
    plain = plain and q.shape[3] == v.shape[3]  # others are not taken by every release and device
    plain = plain and num_queries == num_tokens  # SDPA's is_causal would take the queries for those of the first tokens
    plain = plain and not torch.are_deterministic_algorithms_enabled()  # cuDNN's backward pass adds in any order
    if plain and q.dtype != torch.float32:
        return _dense(q, k, v, scale, length=lengths[0])
    how |= dict(tiles=tiles("attention", "cuda"), launch=hopper.Launch, tma=_copies_by_descriptor(q.device))
    return windowed.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, **how)


@cache
def _copies_by_descriptor(device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _dense(q, k, v, scale, *, length: int):
    """Documents of one length are a batch."""
    rows = (x.reshape(-1, length, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        o = scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return o.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])
