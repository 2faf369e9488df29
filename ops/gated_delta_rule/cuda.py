"""Gated delta rule on NVIDIA GPUs: our Triton kernels, with tiles for Hopper's shared memory and tensor cores.

fp64 and heads larger than the tiles go to the reference.
"""

from __future__ import annotations

from ops.gated_delta_rule import chunked, reference
from ops.gated_delta_rule.chunked import Tile, Tiles

TILES = {
    "chunk_writes": Tile(part=64, num_warps=4, num_stages=1, keys=64),
    "pass_states": Tile(part=64, num_warps=4, num_stages=3),
    "outputs": Tile(part=128, num_warps=4, num_stages=1),
    "steps": Tile(part=16, num_warps=1, num_stages=1),
    "chunk_reads": Tile(part=128, num_warps=4, num_stages=1),
    "pass_gradients": Tile(part=64, num_warps=8, num_stages=3),
    "gradients": Tile(part=64, num_warps=8, num_stages=2),
    "decay_gradients": Tile(part=16, num_warps=1, num_stages=1),
}
CHUNK_TOKENS = 64


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
