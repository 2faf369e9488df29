"""Rotary position embedding on MetaX GPUs: one pass, reading queries and keys where they lie.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.rope.launch import Implementation

accepts, rope, rope_qk = Implementation("maca").functions()
