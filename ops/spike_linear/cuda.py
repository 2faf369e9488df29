"""Spiking linear layers on NVIDIA GPUs: INT8 tensor cores for INT8 weights, plain torch for others.

Hopper has kernels of its own for groups of 128 channels and for one scale a row (see hopper.py).
"""

from __future__ import annotations

from ops.spike_linear.hopper import choose
from ops.spike_linear.launch import Implementation

accepts, spike_linear = Implementation("cuda", wider=choose).functions()
