"""Spike encodings on NVIDIA GPUs."""

from __future__ import annotations

from ops.spike_encode.launch import Implementation

accepts, spike_encode, spike_decode = Implementation("cuda").functions()
