"""Rotary position embedding on MetaX GPUs: one pass, reading x where it lies.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.rope.launch import Implementation

accepts, rope = Implementation("maca").functions()
