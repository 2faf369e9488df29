"""Gated linear attention on MetaX GPUs: our Triton kernels, with tiles for 64 lanes a warp and 64 KB of shared memory.

Their numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware, and the tiles are
borrowed from what others report of chunked kernels there: one stage, since shared memory is what runs out.
"""

from __future__ import annotations

import torch

from ops.gla import chunked, reference
from ops.gla.chunked import Tile, Tiles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 128
KERNELS = (
    "segment_states",
    "outputs",
    "segment_gradients",
    "query_gradients",
    "key_gradients",
    "value_gradients",
)
TILES = Tiles(
    block_tokens=16,
    state_tokens=32,
    num_programs=208,  # two for each of the 104 multiprocessors
    kernels={name: Tile(part=32, num_warps=4, num_stages=1) for name in KERNELS},
)


def gla(q, k, v, log_decay, *, scale=None, initial_state=None, cu_seqlens=None, output_final_state=False):
    """See ops.gla."""
    options = dict(
        scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, output_final_state=output_final_state
    )
    if _on_reference(q, v):
        return reference.gla(q, k, v, log_decay, **options)
    return chunked.gla(q, k, v, log_decay, **options, tiles=TILES)


def gla_output(q, k, v, log_decay, state_in, *, scale=None, cu_seqlens=None):
    """See ops.gla_output."""
    if _on_reference(q, v):
        return reference.gla_output(q, k, v, log_decay, state_in, scale=scale, cu_seqlens=cu_seqlens)
    return chunked.gla_output(q, k, v, log_decay, state_in, scale=scale, cu_seqlens=cu_seqlens, tiles=TILES)


gla_state = reference.gla_state
"""Already one matmul."""


def _on_reference(q, v) -> bool:
    """Other dtypes, large heads, and one token or none (the decoding step is a few small products)."""
    return q.dtype not in DTYPES or q.shape[1] < 2 or max(q.shape[3], v.shape[3]) > LARGEST_HEAD
