"""Kernels of gated linear attention, forward: states of segments, their scan, outputs. See ops/gla/chunked.py.

Shape legend: T tokens, H key heads, G query heads of each (P = G padded to a power of two), K and V head dimensions,
M segments, N documents. States live at boundaries: document n with segments lo..hi-1 owns boundaries lo+n .. hi+n.
Inside a block of C tokens the rows of a query tile are token-major: row r is token r // P, query head r % P.
"""

import triton
import triton.language as tl


@triton.jit
def cumulated(log_decay, FLOOR: tl.constexpr):
    """(b, c, middle): running sums [C, K] of log_decay and of log_decay cut at FLOOR, and c at the middle of the block.

    exp(b) <= 1 takes a state into the block exactly. Between tokens of the block, exp(c_i - middle) * exp(middle - c_j)
    stays in the range of bf16 and fp32 for any decay, since |c - middle| <= FLOOR * C / 2.
    """
    C: tl.constexpr = log_decay.shape[0]
    b = tl.cumsum(log_decay, 0)
    cut = tl.maximum(log_decay, FLOOR)
    first_half = (tl.arange(0, C) < C // 2)[:, None]
    return b, tl.cumsum(cut, 0), tl.sum(tl.where(first_half, cut, 0.0), 0)


@triton.jit
def rows_of(x, P: tl.constexpr):
    """[C, K] -> [C * P, K]: each token's row for all of its query heads."""
    C: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, None, :], (C, P, K)), (C * P, K))


@triton.jit
def segment_states(
    k, v, log_decay, segments, states, totals,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state, at the boundary behind it; and its sum of log_decay. Grid (M, H, V / BV)."""
    m, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, n = tl.load(segments + m * 3), tl.load(segments + m * 3 + 1), tl.load(segments + m * 3 + 2)
    ik, iv, ic = tl.arange(0, BK), part * BV + tl.arange(0, BV), tl.arange(0, C)
    state = tl.zeros((BK, BV), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    for t in range(start, end, C):
        inside = (t + ic) < end
        token = ((t + ic).to(tl.int64) * H + h)[:, None]
        keys = inside[:, None] & (ik < K)[None]
        g = tl.load(log_decay + token * K + ik[None], mask=keys, other=0.0).to(tl.float32)
        key = tl.load(k + token * K + ik[None], mask=keys, other=0.0)
        value = tl.load(v + token * V + iv[None], mask=inside[:, None] & (iv < V)[None], other=0.0).to(DOT)
        b, all_of_it = tl.cumsum(g, 0), tl.sum(g, 0)
        shrunk = (key * tl.exp(all_of_it[None] - b)).to(DOT)
        state = state * tl.exp(all_of_it)[:, None] + tl.dot(tl.trans(shrunk), value, input_precision=PRECISION)
        total += all_of_it
    place = ((m + n + 1).to(tl.int64) * H + h) * K * V
    whole = (ik < K)[:, None] & (iv < V)[None]
    tl.store(states + place + ik[:, None] * V + iv[None], state, mask=whole)
    if part == 0:
        tl.store(totals + (m * H + h) * K + ik, total, mask=ik < K)


@triton.jit
def scan_states(
    states, totals, edges, entering,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn what segments add into states at all boundaries, in place. Grid (N, H, K * V / BLOCK).

    edges int32 [N + 1]: first segment of each document. entering [N, H, K, V]: initial states, or with REVERSE, which
    runs from a document's end to its start, gradients of final states.
    """
    n, h = tl.program_id(0), tl.program_id(1)
    lo, hi = tl.load(edges + n), tl.load(edges + n + 1)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    whole = i < K * V
    state = tl.zeros((BLOCK,), tl.float32)
    if GIVEN:
        state = tl.load(entering + (n * H + h).to(tl.int64) * K * V + i, mask=whole, other=0.0)
    first = hi + n if REVERSE else lo + n
    tl.store(states + (first.to(tl.int64) * H + h) * K * V + i, state, mask=whole)
    for step in range(0, hi - lo):
        m = hi - 1 - step if REVERSE else lo + step
        place = states + ((m + n if REVERSE else m + n + 1).to(tl.int64) * H + h) * K * V + i
        decay = tl.exp(tl.load(totals + (m * H + h) * K + i // V, mask=whole, other=0.0))
        state = decay * state + tl.load(place, mask=whole, other=0.0)
        tl.store(place, state, mask=whole)


@triton.jit
def outputs(
    q, k, v, log_decay, segments, states, o, scale,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, FLOOR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o of each segment from the state at the boundary before it. Grid (M, H, V / BV)."""
    m, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, n = tl.load(segments + m * 3), tl.load(segments + m * 3 + 1), tl.load(segments + m * 3 + 2)
    ik, iv, ic, ir = tl.arange(0, BK), part * BV + tl.arange(0, BV), tl.arange(0, C), tl.arange(0, C * P)
    place = states + ((m + n).to(tl.int64) * H + h) * K * V
    state = tl.load(place + ik[:, None] * V + iv[None], mask=(ik < K)[:, None] & (iv < V)[None], other=0.0)
    causal = (ir // P)[:, None] >= ic[None]
    for t in range(start, end, C):
        inside = (t + ic) < end
        token = ((t + ic).to(tl.int64) * H + h)[:, None]
        keys = inside[:, None] & (ik < K)[None]
        g = tl.load(log_decay + token * K + ik[None], mask=keys, other=0.0).to(tl.float32)
        key = tl.load(k + token * K + ik[None], mask=keys, other=0.0)
        value = tl.load(v + token * V + iv[None], mask=inside[:, None] & (iv < V)[None], other=0.0).to(DOT)
        row = (((t + ir // P).to(tl.int64) * H + h) * G + ir % P)[:, None]
        rows = ((t + ir // P) < end) & (ir % P < G)
        query = tl.load(q + row * K + ik[None], mask=rows[:, None] & (ik < K)[None], other=0.0).to(tl.float32) * scale
        b, c, middle = cumulated(g, FLOOR)
        all_of_it = tl.sum(g, 0)
        entered = (query * rows_of(tl.exp(b), P)).to(DOT)
        out = tl.dot(entered, state.to(DOT), input_precision=PRECISION)
        grown = (query * rows_of(tl.exp(c - middle[None]), P)).to(DOT)
        shrunk = (key * tl.exp(middle[None] - c)).to(DOT)
        scores = tl.dot(grown, tl.trans(shrunk), input_precision=PRECISION)
        scores = tl.where(causal, scores, 0.0).to(DOT)
        out += tl.dot(scores, value, input_precision=PRECISION)
        tl.store(o + row * V + iv[None], out.to(o.dtype.element_ty), mask=rows[:, None] & (iv < V)[None])
        left = (key * tl.exp(all_of_it[None] - b)).to(DOT)
        state = state * tl.exp(all_of_it)[:, None] + tl.dot(tl.trans(left), value, input_precision=PRECISION)
