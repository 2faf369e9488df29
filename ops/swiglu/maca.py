"""SwiGLU on MetaX GPUs: one pass forward, one pass backward.

The kernels' numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.swiglu.launch import Implementation

accepts, swiglu = Implementation("maca").functions()
