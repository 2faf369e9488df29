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
    q,
    k,
    turned_q,
    turned_k,
    positions,
    inv_freq,
    num_tokens,
    row_tokens,
    q_stride_row,
    q_stride_token,
    q_stride_head,
    k_stride_row,
    k_stride_token,
    k_stride_head,
    direction,
    NUM_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """q [B, T, NUM_HEADS, 2 HALF], then k, turned by direction * position * inv_freq. B T = num_tokens.

    The heads of k follow those of q; with NUM_KEY_HEADS = 0 there is no k. TOKENS tokens and HEADS heads a program.
    Heads come first in the tile, so that a thread holds several heads of one token and finds few sines, which it does
    while q and k are on their way. These have unit stride in their last dimension, turned_q and turned_k are
    contiguous. direction -1 turns back: the gradient.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None, None]
    cols = tl.arange(0, BLOCK_HALF)
    row, token = (tokens // row_tokens).to(tl.int64)[None, :, None], (tokens % row_tokens).to(tl.int64)[None, :, None]
    flat = tokens.to(tl.int64)[None, :, None]
    source = q + (row * q_stride_row + token * q_stride_token + heads * q_stride_head)
    target = turned_q + (flat * NUM_HEADS + heads) * (2 * HALF)
    if NUM_KEY_HEADS > 0:
        keys = heads - NUM_HEADS
        of_k = k + (row * k_stride_row + token * k_stride_token + keys * k_stride_head)
        source = tl.where(keys < 0, source, of_k)
        target = tl.where(keys < 0, target, turned_k + (flat * NUM_KEY_HEADS + keys) * (2 * HALF))
    source, target = source + cols[None, None, :], target + cols[None, None, :]
    mask = (heads < NUM_HEADS + NUM_KEY_HEADS) & (tokens < num_tokens)[None, :, None] & (cols < HALF)[None, None, :]
    left = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)

    frequency = tl.load(inv_freq + cols, mask=cols < HALF, other=0.0)
    position = tl.load(positions + tokens, mask=tokens < num_tokens, other=0).to(tl.float32)
    cos, sin = cosine_sine(position[:, None] * frequency[None, :])
    cos, sin = cos[None], (sin * direction)[None]
    tl.store(target, (left * cos - right * sin).to(turned_q.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (right * cos + left * sin).to(turned_q.dtype.element_ty), mask=mask)
