"""SwiGLU on MetaX GPUs: one pass forward, one pass backward. fp64 goes to the reference.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.swiglu import launch

TILES = {
    "forward": dict(BLOCK=1024, num_warps=2, num_stages=1),
    "backward": dict(BLOCK=1024, num_warps=2, num_stages=1),
}


def swiglu(gate_up):
    """See ops.swiglu."""
    return launch.swiglu(gate_up, tiles=TILES)
