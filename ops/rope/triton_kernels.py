"""Body of the rotary embedding kernel; tiles are the caller's."""

import triton
import triton.language as tl


@triton.jit
def rotate(
    x,
    y,
    positions,
    inv_freq,
    num_tokens,
    stride_row,
    stride_token,
    stride_head,
    direction,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """y [B, T, HEADS, 2 HALF] contiguous: x turned by direction * position * inv_freq. One token a program.

    x has unit stride in its last dimension; direction -1 turns back, which is the gradient.
    """
    token = tl.program_id(0).to(tl.int64)
    heads, cols = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < HEADS) & (cols < HALF)
    frequency = tl.load(inv_freq + cols, mask=cols < HALF, other=0.0)
    angle = tl.load(positions + token).to(tl.float32) * frequency
    cos, sin = tl.cos(angle), tl.sin(angle) * direction
    source = x + (token // num_tokens) * stride_row + (token % num_tokens) * stride_token + heads * stride_head + cols
    left = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    target = y + (token * HEADS + heads) * (2 * HALF) + cols
    tl.store(target, (left * cos - right * sin).to(y.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (right * cos + left * sin).to(y.dtype.element_ty), mask=mask)
