"""What an entering state adds to gated linear attention on NVIDIA GPUs: our Triton kernels."""

from __future__ import annotations

from ops.gla_carry.launch import Implementation

accepts, gla_carry = Implementation("cuda", largest_head=256).functions()
