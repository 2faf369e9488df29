"""Spike counts and their values on MetaX GPUs: as on NVIDIA's, with tiles for 64 lanes a warp.

The kernel's numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.spike_count.launch import Implementation

accepts, spike_count, spike_values = Implementation("maca", most_warps=8).functions()
