"""Kernels of gated linear attention, forward: what chunks add to the state, the scan, outputs. See ops/gla/chunked.py.

Shape legend: T tokens, H key heads, G query heads of each, K and V head dimensions, M chunks of at most C tokens, N
documents; BK and BV are padded sizes, PK and PV parts of them that programs share out. sums [T, H, K]
is the running sum of log_decay inside a chunk. A program is one chunk, one key head and one part; it walks over the
query heads of the group, so keys, values, decays and the state are read and prepared once for all of them.
"""

import triton
import triton.language as tl


@triton.jit
def tile(x, tokens, end, stride, offset, columns, WIDTH: tl.constexpr):
    """x[tokens, offset + columns] of a tensor with `stride` numbers a token, 0 outside the chunk and the WIDTH."""
    inside = (tokens < end)[:, None] & (columns < WIDTH)[None]
    return tl.load(x + tokens.to(tl.int64)[:, None] * stride + offset + columns[None], mask=inside, other=0.0)


@triton.jit
def put(x, value, tokens, end, stride, offset, columns, WIDTH: tl.constexpr):
    """Store what `tile` would load."""
    inside = (tokens < end)[:, None] & (columns < WIDTH)[None]
    place = x + tokens.to(tl.int64)[:, None] * stride + offset + columns[None]
    tl.store(place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def state_tile(states, index, ik, iv, K: tl.constexpr, V: tl.constexpr):
    """A state [BK, BV] of states [..., K, V]."""
    place = states + index.to(tl.int64) * (K * V) + ik[:, None] * V + iv[None]
    return tl.load(place, mask=(ik < K)[:, None] & (iv < V)[None], other=0.0)


@triton.jit
def of_heads(
    x, tokens, end, h, first_head, columns, H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, P: tl.constexpr
):
    """Rows of x [T, H * G, W] for P query heads of key head h from first_head on: row p * R + t is head p, token t."""
    R: tl.constexpr = tokens.shape[0]
    row = tl.arange(0, P * R)
    if P == 1:
        return tile(x, tokens, end, H * G * W, (h * G + first_head) * W, columns, W)
    inside = (first_head + row // R < G)[:, None] & (columns < W)[None] & (tokens_of(tokens, P) < end)[:, None]
    place = (tokens_of(tokens, P).to(tl.int64) * (H * G) + h * G + first_head + row // R) * W
    return tl.load(x + place[:, None] + columns[None], mask=inside, other=0.0)


@triton.jit
def put_heads(
    x, value, tokens, end, h, first_head, columns, H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, P: tl.constexpr
):
    """Store what `of_heads` would load."""
    R: tl.constexpr = tokens.shape[0]
    row = tl.arange(0, P * R)
    if P == 1:
        put(x, value, tokens, end, H * G * W, (h * G + first_head) * W, columns, W)
    else:
        inside = (first_head + row // R < G)[:, None] & (columns < W)[None] & (tokens_of(tokens, P) < end)[:, None]
        place = (tokens_of(tokens, P).to(tl.int64) * (H * G) + h * G + first_head + row // R) * W
        tl.store(x + place[:, None] + columns[None], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def tokens_of(tokens, P: tl.constexpr):
    """tokens [R] of the rows of P heads [P * R]."""
    R: tl.constexpr = tokens.shape[0]
    return tl.reshape(tl.broadcast_to(tokens[None], (P, R)), (P * R,))


@triton.jit
def for_heads(x, P: tl.constexpr):
    """x [R, K] for the rows of P heads [P * R, K]."""
    R: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    if P == 1:
        return x
    return tl.reshape(tl.broadcast_to(x[None], (P, R, K)), (P * R, K))


@triton.jit
def is_strong(sums, start, end, h, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """Whether a chunk decays by more than exp(-60) from its middle to either end: one reference will not do then."""
    ik = tl.arange(0, BK)
    middle, last = tl.minimum(start + C // 2, end) - 1, end - 1
    at = sums + h * K + ik
    to_middle = tl.load(at + middle.to(tl.int64) * (H * K), mask=ik < K, other=0.0)
    to_end = tl.load(at + last.to(tl.int64) * (H * K), mask=ik < K, other=0.0)
    return tl.min(tl.minimum(to_middle, to_end - to_middle), 0) < -60.0


@triton.jit
def exponents(
    sums, log_decay, start, end, h, first, ik,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """(of keys [C, BK], of queries [R, BK], of the entering state [BK]) for the R queries from token `first` on.

    exp(of query t) * exp(of key j) is the decay from j to t, and exp(of query t) * exp(of the state) the decay from the
    chunk's start to t. They are split at the middle of the queries, so that neither leaves the range of fp32 and bf16.
    With R = C the caller has looked (is_strong). With fewer, one token's decay is cut at exp(-40), or at exp(-10)
    where several are that strong; both sides then stay within exp(80). Keys after the queries get exp(-inf).
    """
    ic, ir = tl.arange(0, C), tl.arange(0, R)
    b = tile(sums, start + ic, end, H * K, h * K, ik, K)
    if R == C:
        middle = tl.minimum(start + C // 2, end) - 1
        of_state = tl.load(sums + middle.to(tl.int64) * (H * K) + h * K + ik, mask=ik < K, other=0.0)
        return of_state[None] - b, b - of_state[None], of_state
    before = tl.load(
        sums + (start + first - 1).to(tl.int64) * (H * K) + h * K + ik, mask=(ik < K) & (first > 0), other=0.0
    )
    g = tile(log_decay, start + first + ir, end, H * K, h * K, ik, K).to(tl.float32)
    half = (ir < R // 2)[:, None]
    deep = tl.maximum(g, -40.0)
    left, right = tl.sum(tl.where(half, deep, 0.0), 0), tl.sum(tl.where(half, 0.0, deep), 0)
    floor = tl.where(tl.minimum(left, right) < -80.0, -10.0, -40.0)
    cut = tl.maximum(g, floor[None])
    middle = tl.sum(tl.where(half, cut, 0.0), 0)
    earlier, later = (ic < first)[:, None], (ic >= first + R)[:, None]
    g_all = tile(log_decay, start + ic, end, H * K, h * K, ik, K).to(tl.float32)
    c_all = tl.cumsum(tl.where(earlier | later, 0.0, tl.maximum(g_all, floor[None])), 0)
    of_keys = middle[None] - c_all + tl.where(earlier, before[None] - b, 0.0)
    return tl.where(later, -float("inf"), of_keys), tl.cumsum(cut, 0) - middle[None], before + middle


@triton.jit
def chunk_states(
    k, v, log_decay, chunks, sums, totals, added,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, PV: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state [M, H, K, V]; sums; and their last, totals [M, H, K]. Grid (M * PARTS, H)."""
    m, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ik, iv, tokens = tl.arange(0, BK), part * PV + tl.arange(0, PV), start + tl.arange(0, C)
    g = tile(log_decay, tokens, end, H * K, h * K, ik, K).to(tl.float32)
    b, total = tl.cumsum(g, 0), tl.sum(g, 0)
    if part == 0:
        put(sums, b, tokens, end, H * K, h * K, ik, K)
        tl.store(totals + (m * H + h).to(tl.int64) * K + ik, total, mask=ik < K)
    left = (tile(k, tokens, end, H * K, h * K, ik, K) * tl.exp(total[None] - b)).to(DOT)
    value = tile(v, tokens, end, H * V, h * V, iv, V).to(DOT)
    state = tl.dot(tl.trans(left), value, input_precision=PRECISION)
    place = added + (m * H + h).to(tl.int64) * (K * V) + ik[:, None] * V + iv[None]
    tl.store(place, state, mask=(ik < K)[:, None] & (iv < V)[None])


@triton.jit
def scan_states(
    added, totals, edges, given, states, ends,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BV: tl.constexpr, AHEAD: tl.constexpr,
    GIVEN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk [M, H, K, V], and the one behind each document's last, ends fp32 [N, H, K, V].

    edges int32 [N + 1]: first chunk of each document. given [N, H, K, V]: initial states. With REVERSE it runs from a
    document's end to its start: given are gradients of final states, ends those of initial ones. AHEAD chunks are on
    their way at a time. Grid (N, H, K / BLOCK).
    """
    n, h = tl.program_id(0), tl.program_id(1)
    lo, hi = tl.load(edges + n), tl.load(edges + n + 1)
    ik, iv = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BV)
    whole, i = (ik < K)[:, None] & (iv < V)[None], ik[:, None] * V + iv[None]
    state = tl.zeros((BLOCK, BV), tl.float32)
    if GIVEN:
        state = tl.load(given + (n * H + h).to(tl.int64) * (K * V) + i, mask=whole, other=0.0)
    for step in tl.range(0, hi - lo, num_stages=AHEAD):
        m = (hi - 1 - step if REVERSE else lo + step).to(tl.int64) * H + h
        decay = tl.load(totals + m * K + ik, mask=ik < K, other=0.0)
        new = tl.load(added + m * (K * V) + i, mask=whole, other=0.0)
        tl.store(states + m * (K * V) + i, state.to(states.dtype.element_ty), mask=whole)
        state = tl.exp(decay)[:, None] * state + new
    tl.store(ends + (n * H + h).to(tl.int64) * (K * V) + i, state, mask=whole)


@triton.jit
def _block_outputs(
    q, k, v, log_decay, sums, states, o, scale, m, start, end, h, part, first,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, PV: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of R tokens of a chunk, P query heads at a time."""
    ik, iv, ic = tl.arange(0, BK), part * PV + tl.arange(0, PV), tl.arange(0, C)
    tokens = start + first + tl.arange(0, R)
    of_keys, of_queries, of_state = exponents(sums, log_decay, start, end, h, first, ik, H, K, C, R)
    key = (tile(k, start + ic, end, H * K, h * K, ik, K) * tl.exp(of_keys)).to(DOT)
    value = tile(v, start + ic, end, H * V, h * V, iv, V).to(DOT)
    state = (state_tile(states, m * H + h, ik, iv, K, V) * tl.exp(of_state)[:, None]).to(DOT)
    grow = for_heads((tl.exp(of_queries) * scale).to(DOT), P)
    causal = tokens_of(tokens, P)[:, None] >= start + ic[None]
    for head in range(0, G, P):
        query = of_heads(q, tokens, end, h, head, ik, H, G, K, P).to(DOT) * grow
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores = tl.where(causal, scores, 0.0).to(DOT)
        out = tl.dot(query, state, input_precision=PRECISION)
        out = tl.dot(scores, value, out, input_precision=PRECISION)
        put_heads(o, out, tokens, end, h, head, iv, H, G, V, P)


@triton.jit
def outputs(
    q, k, v, log_decay, sums, chunks, states, o, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, PV: tl.constexpr,
    PARTS: tl.constexpr, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o of each chunk from the state that enters it. Where decays are strong, R tokens of P heads make the rows of a
    product instead of C tokens of one. Grid (M * PARTS, H)."""
    m, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    if is_strong(sums, start, end, h, H, K, BK, C):
        for first in tl.range(0, end - start, R, num_stages=1):
            _block_outputs(
                q, k, v, log_decay, sums, states, o, scale, m, start, end, h, part, first,
                H, G, K, V, BK, PV, C, R, P, DOT, PRECISION,
            )  # fmt: skip
    else:
        _block_outputs(
            q, k, v, log_decay, sums, states, o, scale, m, start, end, h, part, 0,
            H, G, K, V, BK, PV, C, C, 1, DOT, PRECISION,
        )  # fmt: skip
