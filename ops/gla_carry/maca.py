"""What an entering state adds to gated linear attention on MetaX GPUs: our Triton kernels, with tiles for 64 KB.

Their numerics are tested in Triton's interpreter; nothing here was ever executed on MetaX hardware.
"""

from __future__ import annotations

from ops.gla_carry.launch import Implementation

accepts, gla_carry = Implementation("maca", largest_head=128).functions()
