"""RMSNorm on MetaX GPUs: as on NVIDIA's, with tiles for 64 lanes a warp.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.rms_norm.launch import Implementation

accepts, rms_norm = Implementation("maca", largest_row=8192, most_warps=8).functions()
