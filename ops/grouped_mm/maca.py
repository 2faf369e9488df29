"""Grouped matrix products on MetaX GPUs: Triton kernels. fp64 and mixed dtypes go to the reference.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware, and the
tiles are small ones of what others report of matmuls there.
"""

from __future__ import annotations

from ops.grouped_mm import launch, reference

TILES = {
    "rows_product": dict(ROWS=64, COLS=64, DEPTH=32, PRECISION="ieee", num_warps=4, num_stages=2),
    "weight_gradient": dict(ROWS=64, COLS=64, DEPTH=32, PRECISION="ieee", num_warps=4, num_stages=2),
}


def grouped_mm(x, weight, *, offsets):
    """See ops.grouped_mm."""
    if x.dtype != weight.dtype or x.dtype not in launch.DTYPES or not len(x):
        return reference.grouped_mm(x, weight, offsets=offsets)
    return launch.grouped_mm(x, weight, offsets=offsets, tiles=TILES)
