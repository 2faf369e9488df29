"""Spike counts and their values on NVIDIA GPUs: one pass over x."""

from __future__ import annotations

from ops.spike_count.launch import Implementation

accepts, spike_count, spike_values = Implementation("cuda", most_warps=32).functions()
