"""Spike encodings on MetaX GPUs.

The kernels are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.spike_encode.launch import Implementation

accepts, spike_encode, spike_decode = Implementation("maca").functions()
