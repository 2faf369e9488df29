"""Accumulation of gradients on NVIDIA GPUs: one pass with wide loads."""

from __future__ import annotations

from ops.accumulate.launch import Implementation

accepts, accumulate = Implementation("cuda").functions()
