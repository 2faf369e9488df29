"""Kernels of the gated delta rule, forward: what chunks write, states between them, outputs; and single steps.

Shape legend: T tokens, K and V head dimensions, M chunks of up to C tokens, N documents; HQ query, HK key and HV value
heads, a state for each value head, H = max(HQ, HV) output heads. Heads of one kind share those of another in blocks:
output head i belongs to value head i // (H / HV), query head i // (H / HQ), key head i // (H / HK).
chunks int32 [M, 2]: first token and end. Numbers of tokens are kept by head, fp32 [HV, T]: sums (b), running sums of
log_decay inside each chunk, and weights, beta. errors [T, HV, V]: what a value differs by from what the state recalls
for its key; beta times that is written.
"""

import triton
import triton.language as tl


@triton.jit
def rows(x, start, head, HEADS: tl.constexpr, SIZE: tl.constexpr, ic, i):
    """Pointers [C, size] into x [T, HEADS, SIZE]: tokens from `start` on, of one head."""
    return x + (tl.cast(start, tl.int64) * HEADS + head) * SIZE + (ic * (HEADS * SIZE))[:, None] + i[None]


@triton.jit
def matrix(x, n, h, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ik, iv):
    """Pointers [BK, BV] into states x [N, HV, K, V]."""
    return x + (tl.cast(n, tl.int64) * HV + h) * (K * V) + (ik * V)[:, None] + iv[None]


@triton.jit
def inverse_of(lower, LEVELS: tl.constexpr, SOLVE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangular [C, C], C = 2^LEVELS.

    Doubling: with D the inverses of the diagonal blocks of n, and E what `lower` has between two of them, the inverses
    of the blocks of 2n are D - D E D. All that is ever formed is the inverse of some block, which is small; powers of
    `lower` are not.
    """
    i = tl.arange(0, lower.shape[0])
    apart = i[:, None] ^ i[None]
    inverse = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, lower, 0.0)
    for level in tl.static_range(1, LEVELS):
        between = tl.where((apart >> level) == 1, lower, 0.0).to(SOLVE)
        blocks = inverse.to(SOLVE)
        left = tl.dot(blocks, between, input_precision=PRECISION).to(SOLVE)
        inverse -= tl.dot(left, blocks, input_precision=PRECISION)
    return inverse


@triton.jit
def chunk_writes(
    k, v, log_decay, beta, chunks, sums, weights, inverses, known, missing, num_tokens,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr, SOLVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's errors as a function of the state that enters it: e = missing - known @ state. Grid (M * HV).

    With D_ij = exp(b_i - b_j) and L = tril(D (k k^T) beta_j, -1): missing [T, HV, V] = (I + L)^-1 v and known
    [T, HV, K] = (I + L)^-1 (exp(b) k). With KEEP also inverses [T, HV, C], the rows of (I + L)^-1, for backward.
    """
    m, h = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ic = tl.arange(0, C)
    inside = (start + ic) < end
    number = tl.cast(start, tl.int64) * HV + h + ic * HV
    b = tl.cumsum(tl.load(log_decay + number, mask=inside, other=0.0).to(tl.float32), 0)
    weight = tl.load(beta + number, mask=inside, other=0.0).to(tl.float32)
    number = tl.cast(h, tl.int64) * num_tokens + start + ic
    tl.store(sums + number, b, mask=inside)
    tl.store(weights + number, weight, mask=inside)
    products = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
        ik = first + tl.arange(0, BK)
        keys = inside[:, None] & (ik < K)[None]
        key = tl.load(rows(k, start, h // (HV // HK), HK, K, ic, ik), mask=keys, other=0.0)
        products += tl.dot(key, tl.trans(key), input_precision=PRECISION)
    decay = tl.exp(tl.where(ic[:, None] > ic[None], b[:, None] - b[None], -float("inf")))
    inverse = inverse_of(products * decay * weight[None], LEVELS, SOLVE, PRECISION)
    if KEEP:
        place = rows(inverses, start, h, HV, C, ic, ic)
        tl.store(place, inverse.to(inverses.dtype.element_ty), mask=inside[:, None])
    scaled = (inverse * tl.exp(b)[None]).to(DOT)
    for first in range(0, K, BK):
        ik = first + tl.arange(0, BK)
        keys = inside[:, None] & (ik < K)[None]
        key = tl.load(rows(k, start, h // (HV // HK), HK, K, ic, ik), mask=keys, other=0.0)
        recall = tl.dot(scaled, key, input_precision=PRECISION)
        tl.store(rows(known, start, h, HV, K, ic, ik), recall.to(DOT), mask=keys)
    inverse = inverse.to(DOT)
    for first in range(0, V, BV):
        iv = first + tl.arange(0, BV)
        values = inside[:, None] & (iv < V)[None]
        value = tl.load(rows(v, start, h, HV, V, ic, iv), mask=values, other=0.0)
        error = tl.dot(inverse, value, input_precision=PRECISION)
        tl.store(rows(missing, start, h, HV, V, ic, iv), error.to(DOT), mask=values)


@triton.jit
def pass_states(
    k, sums, weights, known, missing, bounds, edges, initial, states, final, num_tokens,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, GIVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state through each document: states [M, HV, K, V] that enter its chunks, and errors in place of `missing`.

    Grid (N * HV * V / BV). bounds int32 [N + 1]: tokens; edges int32 [N + 1]: chunks. initial, final fp32
    [N, HV, K, V].
    """
    PARTS: tl.constexpr = (V + BV - 1) // BV
    part, h, n = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % HV, tl.program_id(0) // PARTS // HV
    first, last, lo = tl.load(bounds + n), tl.load(bounds + n + 1), tl.load(edges + n)
    ik, iv, ic = tl.arange(0, BK), part * BV + tl.arange(0, BV), tl.arange(0, C)
    whole = (ik < K)[:, None] & (iv < V)[None]
    state = tl.zeros((BK, BV), tl.float32)
    if GIVEN:
        state = tl.load(matrix(initial, n, h, HV, K, V, ik, iv), mask=whole, other=0.0).to(tl.float32)
    numbers = tl.cast(h, tl.int64) * num_tokens
    for c in range(0, tl.cdiv(last - first, C)):
        start = first + c * C
        inside = (start + ic) < last
        rounded = state.to(DOT)
        tl.store(matrix(states, lo + c, h, HV, K, V, ik, iv), rounded, mask=whole)
        keys = inside[:, None] & (ik < K)[None]
        values = inside[:, None] & (iv < V)[None]
        recall = tl.load(rows(known, start, h, HV, K, ic, ik), mask=keys, other=0.0)
        error = tl.load(rows(missing, start, h, HV, V, ic, iv), mask=values, other=0.0).to(tl.float32)
        key = tl.load(rows(k, start, h // (HV // HK), HK, K, ic, ik), mask=keys, other=0.0)
        total = tl.load(sums + numbers + tl.minimum(start + C, last) - 1)
        leave = tl.exp(total - tl.load(sums + numbers + start + ic, mask=inside, other=0.0))
        leave *= tl.load(weights + numbers + start + ic, mask=inside, other=0.0)
        error -= tl.dot(recall, rounded, input_precision=PRECISION)
        tl.store(rows(missing, start, h, HV, V, ic, iv), error.to(DOT), mask=values)
        state *= tl.exp(total)
        state += tl.dot(tl.trans(key), (error * leave[:, None]).to(DOT), input_precision=PRECISION)
    tl.store(matrix(final, n, h, HV, K, V, ik, iv), state, mask=whole)


@triton.jit
def outputs(
    q, k, sums, weights, errors, states, chunks, o, num_tokens, scale,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [T, H, V] from the entering state and the errors. Grid (M * H * V / BV)."""
    PARTS: tl.constexpr = (V + BV - 1) // BV
    part, i, m = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % H, tl.program_id(0) // PARTS // H
    h = i // (H // HV)
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ik, iv, ic = tl.arange(0, BK), part * BV + tl.arange(0, BV), tl.arange(0, C)
    inside = (start + ic) < end
    keys = inside[:, None] & (ik < K)[None]
    values = inside[:, None] & (iv < V)[None]
    whole = (ik < K)[:, None] & (iv < V)[None]
    query = tl.load(rows(q, start, i // (H // HQ), HQ, K, ic, ik), mask=keys, other=0.0)
    key = tl.load(rows(k, start, i // (H // HK), HK, K, ic, ik), mask=keys, other=0.0)
    number = tl.cast(h, tl.int64) * num_tokens + start + ic
    b = tl.load(sums + number, mask=inside, other=0.0)
    weight = tl.load(weights + number, mask=inside, other=0.0)
    state = tl.load(matrix(states, m, h, HV, K, V, ik, iv), mask=whole, other=0.0)
    error = tl.load(rows(errors, start, h, HV, V, ic, iv), mask=values, other=0.0)
    out = tl.dot(query, state, input_precision=PRECISION) * tl.exp(b)[:, None]
    causal = (ic[:, None] >= ic[None]) & inside[:, None]
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * weight[None]
    scores *= tl.exp(tl.where(causal, b[:, None] - b[None], -float("inf")))
    out += tl.dot(scores.to(DOT), error, input_precision=PRECISION)
    tl.store(rows(o, start, i, H, V, ic, iv), (out * scale).to(o.dtype.element_ty), mask=values)


@triton.jit
def steps(
    q, k, v, log_decay, beta, bounds, initial, o, final, scale,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token, for a few tokens. Grid (N * HV * V / BV)."""
    PARTS: tl.constexpr = (V + BV - 1) // BV
    part, h, n = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % HV, tl.program_id(0) // PARTS // HV
    ik, iv = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    keys, values = ik < K, iv < V
    whole = keys[:, None] & values[None]
    state = tl.zeros((BK, BV), tl.float32)
    if GIVEN:
        state = tl.load(matrix(initial, n, h, HV, K, V, ik, iv), mask=whole, other=0.0).to(tl.float32)
    first, last = tl.load(bounds + n).to(tl.int64), tl.load(bounds + n + 1)
    for t in range(0, last - first):
        token = first + t
        key = tl.load(k + (token * HK + h // (HV // HK)) * K + ik, mask=keys, other=0.0).to(tl.float32)
        value = tl.load(v + (token * HV + h) * V + iv, mask=values, other=0.0).to(tl.float32)
        state *= tl.exp(tl.load(log_decay + token * HV + h).to(tl.float32))
        write = value - tl.sum(key[:, None] * state, 0)
        write *= tl.load(beta + token * HV + h).to(tl.float32)
        state += key[:, None] * write[None]
        for g in tl.static_range(H // HV):
            i = h * (H // HV) + g
            query = tl.load(q + (token * HQ + i // (H // HQ)) * K + ik, mask=keys, other=0.0).to(tl.float32)
            out = tl.sum(query[:, None] * state, 0) * scale
            tl.store(o + (token * H + i) * V + iv, out.to(o.dtype.element_ty), mask=values)
    tl.store(matrix(final, n, h, HV, K, V, ik, iv), state, mask=whole)
