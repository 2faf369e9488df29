"""Accumulation of gradients on MetaX GPUs: one pass with wide loads.

The kernel's numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.accumulate.launch import Implementation

accepts, accumulate = Implementation("maca").functions()
