"""Grouped matrix products on MetaX GPUs: Triton kernels.

Their numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.grouped_mm.launch import Implementation

accepts, grouped_mm = Implementation("maca", precision="ieee").functions()
