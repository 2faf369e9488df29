"""Output layer and cross-entropy on MetaX GPUs: as on NVIDIA's, with tiles for 64 lanes a warp.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

import torch

from ops.linear_cross_entropy import launch, reference

TILES = {
    "statistics": dict(LANES=256, WIDTH=8, num_warps=4, num_stages=1),
    "gradient": dict(BLOCK=2048, num_warps=4, num_stages=1),
}


def linear_cross_entropy(hidden, weight, labels, **options):
    """See ops.linear_cross_entropy."""
    arithmetic = reference.Arithmetic() if hidden.dtype == torch.float64 else launch.Kernels(TILES)
    return reference.losses(arithmetic, hidden, weight, labels, **options)
