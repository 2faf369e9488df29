"""Output layer and cross-entropy on NVIDIA GPUs: Triton for the softmax, torch for the products; fp64 on the reference.

The products that make the gradient of weight are added to it in fp32 by the matmul itself.
"""

from __future__ import annotations

import torch

from ops.linear_cross_entropy import launch, reference

TILES = {
    "statistics": dict(LANES=512, WIDTH=8, num_warps=8, num_stages=1),
    "gradient": dict(BLOCK=4096, num_warps=8, num_stages=1),
}


def linear_cross_entropy(hidden, weight, labels, **options):
    """See ops.linear_cross_entropy."""
    arithmetic = reference.Arithmetic() if hidden.dtype == torch.float64 else launch.Kernels(TILES)
    return reference.losses(arithmetic, hidden, weight, labels, **options)
