"""Attention on NVIDIA GPUs, in bf16 and fp16: cuDNN through torch's SDPA for documents of one length without a window,
and FlexAttention for windows, other documents, sinks (put before the keys) and log-sum-exps.

Every mask here is "keys first[t] .. t of query t", so FlexAttention compiles one kernel for all of them, and its block
mask is computed from `first` without a T x T matrix. Other dtypes go to the reference.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ops import documents
from ops.attention import reference

DTYPES = (torch.bfloat16, torch.float16)
BLOCK_TOKENS = 128

# A run meets several shapes (stages, evaluation): past torch's default of 8 kernels, fullgraph=True raises. That is
# better than the T x T matrix of uncompiled FlexAttention, and enough room is better still.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
_flex = torch.compile(flex_attention, fullgraph=True)
OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}  # one kernel for all lengths: no switch to the decoding kernel below 128


def attention(q, k, v, *, window=None, cu_seqlens=None, sink_k=None, sink_v=None, scale=None, return_lse=False):
    """See ops.attention."""
    if q.dtype not in DTYPES or q.shape[1] == 0:
        return reference.attention(
            q,
            k,
            v,
            window=window,
            cu_seqlens=cu_seqlens,
            sink_k=sink_k,
            sink_v=sink_v,
            scale=scale,
            return_lse=return_lse,
        )
    num_tokens = q.shape[1]
    lengths = [num_tokens] if cu_seqlens is None else documents.lengths(cu_seqlens)
    if window is not None and window >= max(lengths):
        window = None
    if len(lengths) == 1:
        cu_seqlens = None
    if window is None and len(set(lengths)) == 1 and sink_k is None and not return_lse:
        return _dense(q, k, v, scale, length=lengths[0])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    num_sinks = 0
    if sink_k is not None:
        num_sinks = len(sink_k)
        k, v = (
            torch.cat([sink.to(x.dtype).transpose(0, 1).expand(len(x), -1, -1, -1), x], 2)
            for sink, x in ((sink_k, k), (sink_v, v))
        )
    mask = _mask(cu_seqlens, window, num_tokens, num_sinks, q.device)
    result = _flex(
        q,
        k,
        v,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_lse=return_lse,
        kernel_options=OPTIONS,
    )
    if return_lse:
        return result[0].transpose(1, 2), result[1].transpose(1, 2)
    return result.transpose(1, 2)


def _dense(q, k, v, scale, *, length: int):
    """Documents of one length are a batch."""
    rows = (x.reshape(-1, length, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        o = scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return o.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


def _mask(cu_seqlens, window, num_tokens, num_sinks, device) -> BlockMask:
    """The mask of these documents, made once for all layers of a step."""
    if cu_seqlens is None:
        return _plain_mask(window, num_tokens, num_sinks, device)

    def build() -> BlockMask:
        first = documents.first_visible(cu_seqlens, window, num_tokens=num_tokens, device=device)
        return block_mask(first, num_sinks)

    return documents.derived(cu_seqlens, ("block_mask", window, num_sinks, device), build)


@lru_cache(maxsize=8)
def _plain_mask(window, num_tokens, num_sinks, device) -> BlockMask:
    return block_mask(documents.first_visible(None, window, num_tokens=num_tokens, device=device), num_sinks)


def block_mask(first: Tensor, num_sinks: int = 0) -> BlockMask:
    """FlexAttention's mask for "query t sees the sinks and keys first[t] .. t"; first int64 [T], non-decreasing.

    The keys are num_sinks sinks, then T tokens. Because first never decreases, the keys that a block of queries sees
    are one range, from the first query's first key to the last query; keys that all of its queries see are the range
    from the last query's first key to the first query.
    """
    num_tokens, device = len(first), first.device
    num_keys = num_tokens + num_sinks
    top = torch.arange(0, num_tokens, BLOCK_TOKENS, device=device)
    bottom = (top + BLOCK_TOKENS - 1).clamp(max=num_tokens - 1)
    top, bottom = top[:, None], bottom[:, None]
    left = torch.arange(0, num_keys, BLOCK_TOKENS, device=device) - num_sinks
    right = left + BLOCK_TOKENS - 1
    some = (left < 0) | ((right >= first[top]) & (left <= bottom))
    every = (right < 0) | ((left.clamp(min=0) >= first[bottom]) & (right <= top))
    first = first.to(torch.int32)

    def seen(row, head, query, key):
        token = key - num_sinks
        return (token < 0) | ((token <= query) & (token >= first[query]))

    def seen_without_sinks(row, head, query, key):
        return (key <= query) & (key >= first[query])

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(some & every),
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=seen if num_sinks else seen_without_sinks,
        seq_lengths=(num_tokens, num_keys),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(number, indices first) of the set blocks of each row, int32 with leading dimensions for row and head."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].contiguous(), indices[None, None].contiguous()
