"""Kernels of ops.gla_carry. Legend as in ops/gla/triton_forward.py, for the M chunks of document 0 alone.

length is its number of tokens. `before` fp32 [M, H, K] is the sum of log_decay over all tokens before a chunk. Decays
only fall, and where exp of them is 0 in every channel the state has no part in the chunk nor in any later one: programs
look at that first and leave such a chunk alone.
"""

import triton
import triton.language as tl

from ops.gla.triton_forward import of_heads, put, put_heads, state_tile, tile


@triton.jit
def _reaches(before, index, K: tl.constexpr, BK: tl.constexpr):
    """Whether the state has a part in a chunk: below -104, exp is 0 in fp32."""
    ik = tl.arange(0, BK)
    return tl.max(tl.load(before + index.to(tl.int64) * K + ik, mask=ik < K, other=-float("inf")), 0) > -104.0


@triton.jit
def _decays(log_decay, before, index, tokens, length, h, ik, H: tl.constexpr, K: tl.constexpr):
    """exp of the sum of log_decay from token 0 to each of a chunk's [C, len(ik)]."""
    start = tl.load(before + index.to(tl.int64) * K + ik, mask=ik < K, other=0.0)
    g = tile(log_decay, tokens, length, H * K, h * K, ik, K).to(tl.float32)
    return tl.exp(start[None] + tl.cumsum(g, 0))


@triton.jit
def chunk_sums(
    log_decay, sums, length,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum of log_decay over each chunk, sums fp32 [M, H, K]. Grid (M, H)."""
    m, h = tl.program_id(0), tl.program_id(1)
    ik, tokens = tl.arange(0, BK), m * C + tl.arange(0, C)
    g = tile(log_decay, tokens, length, H * K, h * K, ik, K).to(tl.float32)
    tl.store(sums + (m * H + h).to(tl.int64) * K + ik, tl.sum(g, 0), mask=ik < K)


@triton.jit
def scan_sums(
    sums, others, num_chunks,
    H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Sum over the chunks before each, others fp32 [M, H, K]; with REVERSE, after each. Grid (H * K / BLOCK)."""
    columns, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, num_chunks, ROWS):
        m = num_chunks - 1 - first - row if REVERSE else first + row
        inside = ((m >= 0) & (m < num_chunks))[:, None] & (columns < H * K)[None]
        place = m.to(tl.int64)[:, None] * (H * K) + columns[None]
        x = tl.load(sums + place, mask=inside, other=0.0)
        tl.store(others + place, total[None] + (tl.cumsum(x, 0) - x), mask=inside)
        total += tl.sum(x, 0)


@triton.jit
def add_state(
    o, q, log_decay, before, state, length, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, PV: tl.constexpr,
    PARTS: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the state's part to o. Parts are of V. Grid (M * PARTS, H)."""
    m, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    if _reaches(before, m * H + h, K, BK):
        ik, iv, tokens = tl.arange(0, BK), part * PV + tl.arange(0, PV), m * C + tl.arange(0, C)
        grow = (_decays(log_decay, before, m * H + h, tokens, length, h, ik, H, K) * scale).to(DOT)
        value = state_tile(state, h, ik, iv, K, V).to(DOT)
        for head in range(0, G):
            query = of_heads(q, tokens, length, h, head, ik, H, G, K, 1).to(DOT) * grow
            out = of_heads(o, tokens, length, h, head, iv, H, G, V, 1).to(tl.float32)
            out = tl.dot(query, value, out, input_precision=PRECISION)
            put_heads(o, out, tokens, length, h, head, iv, H, G, V, 1)


@triton.jit
def query_gradients(
    q, do, log_decay, before, state, dq, inside, sums, length, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PK: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq where the state reaches; of q * dq over the query heads, its sums over each chunk, fp32 [M, H, K], and from
    each token to its chunk's end, inside fp32 [T, H, K]. Parts are of K. Grid (M * PARTS, H)."""
    m, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    ik = part * PK + tl.arange(0, PK)
    total = tl.zeros((PK,), tl.float32)
    if _reaches(before, m * H + h, K, BK):
        iv, tokens = tl.arange(0, BV), m * C + tl.arange(0, C)
        grow = _decays(log_decay, before, m * H + h, tokens, length, h, ik, H, K) * scale
        value = tl.trans(state_tile(state, h, ik, iv, K, V).to(DOT))
        product = tl.zeros((C, PK), tl.float32)
        for head in range(0, G):
            dout = of_heads(do, tokens, length, h, head, iv, H, G, V, 1).to(DOT)
            grad = tl.dot(dout, value, input_precision=PRECISION) * grow
            product += of_heads(q, tokens, length, h, head, ik, H, G, K, 1).to(tl.float32) * grad
            put_heads(dq, grad, tokens, length, h, head, ik, H, G, K, 1)
        total = tl.sum(product, 0)
        put(inside, total[None] - tl.cumsum(product, 0) + product, tokens, length, H * K, h * K, ik, K)
    tl.store(sums + (m * H + h).to(tl.int64) * K + ik, total, mask=ik < K)


@triton.jit
def decay_gradients(
    before, inside, after, dg, length,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of log_decay where the state reaches: q * dq of a token and of all later ones. Grid (M, H)."""
    m, h = tl.program_id(0), tl.program_id(1)
    if _reaches(before, m * H + h, K, BK):
        ik, tokens = tl.arange(0, BK), m * C + tl.arange(0, C)
        later = tl.load(after + (m * H + h).to(tl.int64) * K + ik, mask=ik < K, other=0.0)
        dlog = tile(inside, tokens, length, H * K, h * K, ik, K) + later[None]
        put(dg, dlog, tokens, length, H * K, h * K, ik, K)


@triton.jit
def state_gradients(
    q, do, log_decay, before, shares, length, num_chunks, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, PV: tl.constexpr,
    PARTS: tl.constexpr, SHARES: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's gradient in shares fp32 [SHARES, H, K, V] to be summed: of the chunks share, share + SHARES, ..., so
    that those which the state reaches, the first ones, are spread. Parts are of V. Grid (SHARES * PARTS, H)."""
    share, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    ik, iv = tl.arange(0, BK), part * PV + tl.arange(0, PV)
    grad = tl.zeros((BK, PV), tl.float32)
    for m in tl.range(share, num_chunks, SHARES, num_stages=1):
        if _reaches(before, m * H + h, K, BK):
            tokens = m * C + tl.arange(0, C)
            grow = (_decays(log_decay, before, m * H + h, tokens, length, h, ik, H, K) * scale).to(DOT)
            for head in range(0, G):
                query = of_heads(q, tokens, length, h, head, ik, H, G, K, 1).to(DOT) * grow
                dout = of_heads(do, tokens, length, h, head, iv, H, G, V, 1).to(DOT)
                grad += tl.dot(tl.trans(query), dout, input_precision=PRECISION)
    place = shares + (share * H + h).to(tl.int64) * (K * V) + ik[:, None] * V + iv[None]
    tl.store(place, grad, mask=(ik < K)[:, None] & (iv < V)[None])
