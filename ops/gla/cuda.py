"""Gated linear attention on NVIDIA GPUs: our Triton kernels, see ops/gla/chunked.py."""

from __future__ import annotations

from ops.gla.chunked import Implementation

_IMPLEMENTATION = Implementation("cuda", largest_head=256)
accepts, gla, gla_output, gla_state = _IMPLEMENTATION.functions()
