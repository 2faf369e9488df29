"""Gated linear attention on NVIDIA GPUs: our Triton kernels (ops/gla/chunked.py). Other dtypes than bf16, fp16 and fp32
and heads of more than 256 numbers go to the reference."""

from __future__ import annotations

from ops.gla.chunked import Implementation, Tile, Tiles

TILES = Tiles(
    chunk_tokens=64,
    scan_ahead=16,
    kernels=(
        ("chunk_states", Tile(128, num_warps=4, num_stages=1)),
        ("outputs", Tile(128, num_warps=4, num_stages=3)),
        ("chunk_gradients", Tile(128, num_warps=4, num_stages=3)),
        ("query_gradients", Tile(64, num_warps=4, num_stages=3)),
        ("key_gradients", Tile(64, num_warps=4, num_stages=3)),
        ("value_gradients", Tile(128, num_warps=4, num_stages=2)),
    ),
)
"""Heads of up to 128 numbers in bf16."""

LARGE = Tiles(chunk_tokens=32, every=Tile(64, num_warps=8, num_stages=1))
"""Heads of up to 256 numbers."""

WIDE = Tiles(chunk_tokens=32, every=Tile(32, num_warps=4, num_stages=1))
"""fp16, whose products run in tf32, and fp32."""

_IMPLEMENTATION = Implementation(narrow=TILES, large=LARGE, wide=WIDE, largest_head=256)
gla, gla_output, gla_state = _IMPLEMENTATION.gla, _IMPLEMENTATION.gla_output, _IMPLEMENTATION.gla_state
