"""Gated delta rule on MetaX GPUs: our Triton kernels, with tiles for 64 lanes a warp and 64 KB of shared memory.

Their numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware, and the tiles are
borrowed: one stage, since shared memory is what runs out. fp64 and larger heads go to the reference.
"""

from __future__ import annotations

from ops.gated_delta_rule import chunked, reference
from ops.gated_delta_rule.chunked import Tile, Tiles

KERNELS = ("chunk_writes", "pass_states", "outputs", "chunk_reads", "pass_gradients", "gradients")
TILES = {name: Tile(part=32, num_warps=4, num_stages=1) for name in KERNELS}
TILES |= {name: Tile(part=16, num_warps=1, num_stages=1) for name in ("steps", "decay_gradients")}
CHUNK_TOKENS = 32


def gated_delta_rule(
    q,
    k,
    v,
    log_decay,
    beta,
    *,
    scale=None,
    initial_state=None,
    cu_seqlens=None,
    output_final_state=False,
    qk_l2norm=False,
):
    """See ops.gated_delta_rule."""
    options = dict(
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        qk_l2norm=qk_l2norm,
    )
    if not chunked.runs_here(q, v):
        return reference.gated_delta_rule(q, k, v, log_decay, beta, **options)
    return chunked.gated_delta_rule(q, k, v, log_decay, beta, **options, tiles=Tiles(CHUNK_TOKENS, TILES))
