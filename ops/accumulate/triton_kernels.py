"""Body of the accumulation; the tile is the caller's. A program takes BLOCK elements of size in all."""

import triton
import triton.language as tl


@triton.jit
def accumulate(total, part, size, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """total [size] fp32 = part [size], or total + part."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    value = tl.load(part + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(total + at, mask=mask, other=0.0)
    tl.store(total + at, value, mask=mask)
