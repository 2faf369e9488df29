"""FlexAttention as a peer of ops.attention: causal, sliding window, packed documents, sinks before the keys.

Every mask here is "the sinks, and keys first[t] .. t of token t", so its block mask follows from `first` alone, without
a matrix of all pairs of tokens.
"""

from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ops import documents
from sbtrain.bench.ops_case import Inputs, Version

BLOCK_TOKENS = 128
OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}  # never its decoding kernel, which short inputs would get


def flex_version(window: Optional[int]) -> Version:
    """The peer; the mask is made beforehand, as one mask serves all layers of a step."""

    def prepare(inputs: Inputs) -> Inputs:
        num_tokens, device = inputs["k"].shape[1], inputs["k"].device
        first = documents.first_visible(inputs.get("cu_seqlens"), window, num_tokens=num_tokens, device=device)
        num_sinks = len(inputs["sink_k"]) if "sink_k" in inputs else 0
        return {**inputs, "mask": block_mask(first, num_sinks, num_tokens - inputs["q"].shape[1])}

    return Version("FlexAttention", _load, prepare)


def _load() -> Callable[[Inputs], tuple[Tensor, ...]]:
    # one kernel a length: a kernel for all lengths would be slower
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
        if "sink_k" in inputs:
            k, v = (torch.cat([inputs[sink].transpose(0, 1)[None], x], 2) for sink, x in (("sink_k", k), ("sink_v", v)))
        o = compiled(q, k, v, block_mask=inputs["mask"], enable_gqa=True, kernel_options=OPTIONS)
        return (o.transpose(1, 2),)

    return call


def block_mask(first: Tensor, num_sinks: int = 0, ahead: int = 0) -> BlockMask:
    """The mask of first int64 [T], non-decreasing, over num_sinks sinks and then T keys, for the queries of all tokens
    but the first `ahead`.

    The keys that a block of queries sees are one range, from its first query's first key to its last query; the keys
    that all of its queries see run from its last query's first key to its first query.
    """
    num_tokens, device = len(first), first.device
    top = torch.arange(ahead, num_tokens, BLOCK_TOKENS, device=device)
    bottom = (top + BLOCK_TOKENS - 1).clamp(max=num_tokens - 1)
    top, bottom = top[:, None], bottom[:, None]
    left = torch.arange(0, num_tokens + num_sinks, BLOCK_TOKENS, device=device) - num_sinks
    right = left + BLOCK_TOKENS - 1
    seen = (left < 0) | ((right >= first[top]) & (left <= bottom))
    whole = (right < 0) | ((left.clamp(min=0) >= first[bottom]) & (right <= top))
    first = first.to(torch.int32)

    def with_sinks(row, head, query, key):
        token = key - num_sinks
        return (token < 0) | ((token <= ahead + query) & (token >= first[ahead + query]))

    def without_sinks(row, head, query, key):
        return (key <= ahead + query) & (key >= first[ahead + query])

    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=with_sinks if num_sinks else without_sinks,
        seq_lengths=(num_tokens - ahead, num_tokens + num_sinks),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(number, indices first) of the set blocks of each row, int32 with leading dimensions for row and head."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].contiguous(), indices[None, None].contiguous()
