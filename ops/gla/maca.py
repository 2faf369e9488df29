"""Gated linear attention on MetaX GPUs: our Triton kernels, with tiles for 64 lanes a warp and 64 KB of shared memory.

Their numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware, and the tiles are
borrowed from what others report of chunked kernels there: one stage, since shared memory is what runs out. Other dtypes
than bf16, fp16 and fp32 and heads of more than 128 numbers go to the reference.
"""

from __future__ import annotations

from ops.gla.chunked import Implementation, Tile, Tiles

TILES = Tiles(chunk_tokens=32, scan_ahead=1, every=Tile(32, num_warps=4, num_stages=1))

_IMPLEMENTATION = Implementation(narrow=TILES, large=TILES, wide=TILES, largest_head=128)
gla, gla_output, gla_state = _IMPLEMENTATION.gla, _IMPLEMENTATION.gla_output, _IMPLEMENTATION.gla_state
