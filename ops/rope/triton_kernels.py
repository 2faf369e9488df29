"""Body of the rotary embedding kernel; tiles are the caller's."""

import triton
import triton.language as tl


@triton.jit
def cosine_sine(angle):
    """(cos, sin) in fp32, good to 1e-7 for |angle| up to 1e6 where the hardware has fused multiply-adds.

    The libraries' functions carry a branch for huge angles that costs registers. Here the nearest multiple of pi/2 is
    taken off in three pieces (Cody and Waite); the rest, at most pi/4, goes through least-maximum polynomials.
    """
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = tl.fma(turns, -1.5707963705062866, angle)
    rest = tl.fma(turns, 4.371138828673793e-08, rest)
    rest = tl.fma(turns, 1.7150994166548195e-15, rest)
    square = rest * rest
    sin = -0.16666650772094727 + square * (0.008331951685249805 + square * -0.0001949220895767212)
    sin = rest + rest * square * sin
    cos = 0.04166664555668831 + square * (-0.0013887337408959866 + square * 2.4434846636722796e-05)
    cos = 1.0 - 0.5 * square + square * square * cos
    quarter = turns.to(tl.int32)
    odd = (quarter & 1) != 0
    turned_cos, turned_sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    turned_cos = tl.where(((quarter + 1) & 2) != 0, -turned_cos, turned_cos)
    return turned_cos, tl.where((quarter & 2) != 0, -turned_sin, turned_sin)


@triton.jit
def rotate(
    x,
    y,
    positions,
    inv_freq,
    num_tokens,
    row_tokens,
    stride_row,
    stride_token,
    stride_head,
    direction,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """y [B, T, NUM_HEADS, 2 HALF] contiguous: x turned by direction * position * inv_freq. B T = num_tokens.

    TOKENS tokens and HEADS heads a program. Heads come first in the tile, so that a thread holds several heads of one
    token and finds few sines. x has unit stride in its last dimension; direction -1 turns back: the gradient.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK_HALF)
    frequency = tl.load(inv_freq + cols, mask=cols < HALF, other=0.0)
    position = tl.load(positions + tokens, mask=tokens < num_tokens, other=0).to(tl.float32)
    angle = position[:, None] * frequency[None, :]
    cos, sin = cosine_sine(angle)
    cos, sin = cos[None], (sin * direction)[None]

    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None, None]
    tokens, cols = tokens.to(tl.int64)[None, :, None], cols[None, None, :]
    mask = (heads < NUM_HEADS) & (tokens < num_tokens) & (cols < HALF)
    place = (tokens // row_tokens) * stride_row + (tokens % row_tokens) * stride_token
    source = x + place + heads * stride_head + cols
    left = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    target = y + (tokens * NUM_HEADS + heads) * (2 * HALF) + cols
    tl.store(target, (left * cos - right * sin).to(y.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (right * cos + left * sin).to(y.dtype.element_ty), mask=mask)
