"""Rotary position embedding on NVIDIA GPUs: one pass, reading x where it lies. fp64 goes to the reference."""

from __future__ import annotations

from ops.rope import launch

TILES = {"rotate": dict(TOKENS=8, HEADS=4, num_warps=4, num_stages=1)}


def rope(x, positions, inv_freq):
    """See ops.rope."""
    return launch.rope(x, positions, inv_freq, tiles=TILES)
