"""Gated delta rule on MetaX GPUs: our Triton kernels, with tiles for 64 lanes a warp and 64 KB of shared memory.

Their numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.gated_delta_rule.chunked import Implementation

_IMPLEMENTATION = Implementation("maca")
accepts, gated_delta_rule = _IMPLEMENTATION.functions()
