"""Gated delta rule on NVIDIA GPUs: our Triton kernels, see ops/gated_delta_rule/chunked.py."""

from __future__ import annotations

from ops.gated_delta_rule.chunked import Implementation

_IMPLEMENTATION = Implementation("cuda")
accepts, gated_delta_rule = _IMPLEMENTATION.functions()
