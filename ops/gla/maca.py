"""Gated linear attention on MetaX GPUs: our Triton kernels, with tiles for 64 lanes a warp and 64 KB of shared memory.

Their numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.gla.chunked import Implementation

_IMPLEMENTATION = Implementation("maca", largest_head=128)
accepts, gla, gla_output, gla_state = _IMPLEMENTATION.functions()
