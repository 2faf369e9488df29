"""Output layer and cross-entropy on MetaX GPUs: as on NVIDIA's, with tiles for 64 lanes a warp.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.linear_cross_entropy.launch import Implementation

accepts, linear_cross_entropy = Implementation("maca").functions()
