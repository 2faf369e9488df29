"""Spiking linear layers on MetaX GPUs: as on NVIDIA's, with tiles for 64 KB of shared memory.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.spike_linear.launch import Implementation

accepts, spike_linear = Implementation("maca").functions()
