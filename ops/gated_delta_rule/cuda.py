"""Gated delta rule on NVIDIA GPUs: our Triton kernels, see ops/gated_delta_rule/chunked.py."""

from __future__ import annotations

from ops.gated_delta_rule.chunked import Implementation

_IMPLEMENTATION = Implementation("cuda")
accepts, gated_delta_rule = _IMPLEMENTATION.functions()

SPACE = {"chunk_writes": {"PART": (64, 128), "KEYS": (64, 128)}}
"""For a search for tiles. PART = 32 in `chunk_writes` ended in an illegal memory access on an H200 with Triton 3.6."""
