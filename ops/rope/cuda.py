"""Rotary position embedding on NVIDIA GPUs: one pass, reading queries and keys where they lie."""

from __future__ import annotations

from ops.rope.launch import Implementation

accepts, rope, rope_qk = Implementation("cuda").functions()
