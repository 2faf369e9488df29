"""SwiGLU on NVIDIA GPUs: one pass forward, one pass backward."""

from __future__ import annotations

from ops.swiglu.launch import Implementation

accepts, swiglu = Implementation("cuda").functions()
