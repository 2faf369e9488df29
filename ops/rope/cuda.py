"""Rotary position embedding on NVIDIA GPUs: one pass, reading x where it lies."""

from __future__ import annotations

from ops.rope.launch import Implementation

accepts, rope = Implementation("cuda").functions()
