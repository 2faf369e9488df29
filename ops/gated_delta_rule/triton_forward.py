"""Kernels of the gated delta rule, forward: what chunks write, states between them, outputs; and single steps.

Shape legend: T tokens, K and V head dimensions, M chunks of up to C tokens, N documents; HQ query, HK key and HV value
heads, a state for each value head, H = max(HQ, HV) output heads. Heads of one kind share those of another in blocks:
output head i belongs to value head i // (H / HV), query head i // (H / HQ), key head i // (H / HK).
chunks int32 [M, 2]: first token and end. Numbers of tokens are kept by head, fp32 [HV, T]: sums (b), running sums of
log_decay inside each chunk, and weights, beta. What only kernels read is kept by chunk, of full length, with value
columns as rows: states [M, HV, V, K], and errors [M, HV, V, C], what a value differs by from what the state recalls for
its key; beta times that is written. A boxed kernel gets descriptors of such tensors, where others get pointers.
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
def transposed(x, n, h, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ik, iv):
    """Pointers [BV, BK] into fp32 states x [N, HV, K, V]."""
    return x + (tl.cast(n, tl.int64) * HV + h) * (K * V) + (ik * V)[None] + iv[:, None]


@triton.jit
def within(i, j, ROWS, COLUMNS: tl.constexpr):
    """Mask [i, j] of places inside [ROWS, COLUMNS]."""
    mask = (i < ROWS)[:, None]
    if (j.shape[0] - 1) & COLUMNS != 0:
        mask &= (j < COLUMNS)[None]
    return mask


@triton.jit
def block(x, n, row, column, i, j, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOXED: tl.constexpr):
    """x[n, row + i, column + j] of x [N, ROWS, COLUMNS], with zeros outside."""
    if BOXED:
        found = x.load([n, row, column]).reshape(i.shape[0], j.shape[0])
    else:
        place = x + tl.cast(n, tl.int64) * (ROWS * COLUMNS) + ((row + i) * COLUMNS)[:, None] + (column + j)[None]
        if (i.shape[0] - 1) & ROWS == 0 and (j.shape[0] - 1) & COLUMNS == 0:  # sizes of blocks are powers of two
            found = tl.load(place)
        else:
            found = tl.load(place, mask=within(row + i, column + j, ROWS, COLUMNS), other=0.0)
    return found


@triton.jit
def put_block(x, n, row, i, j, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOXED: tl.constexpr):
    """x[n, row + i, j] = value, without what lies outside."""
    if BOXED:
        x.store([n, row, 0], value.reshape(1, i.shape[0], j.shape[0]))
    else:
        place = x + tl.cast(n, tl.int64) * (ROWS * COLUMNS) + ((row + i) * COLUMNS)[:, None] + j[None]
        if (i.shape[0] - 1) & ROWS == 0 and (j.shape[0] - 1) & COLUMNS == 0:  # sizes of blocks are powers of two
            tl.store(place, value)
        else:
            tl.store(place, value, mask=within(row + i, j, ROWS, COLUMNS))


@triton.jit
def chunk_rows(x, start, end, head, column, HEADS: tl.constexpr, SIZE: tl.constexpr, ic, i, BOXED: tl.constexpr):
    """x[start + ic, head, column + i] of x [T, HEADS, SIZE]; from `end` on zeros, or boxed what other documents have"""
    if BOXED:
        found = x.load([start, head, column]).reshape(ic.shape[0], i.shape[0])
    else:
        mask = within(start + ic, column + i, end, SIZE)
        found = tl.load(rows(x, start, head, HEADS, SIZE, ic, column + i), mask=mask, other=0.0)
    return found


@triton.jit
def inverse_of(lower, LEVELS: tl.constexpr, SOLVE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangular [C, C], C = 2^LEVELS.

    Doubling: with D the inverses of the diagonal blocks of n, and E what `lower` has between two of them, the inverses
    of the blocks of 2n are D - D E D. All that is ever formed is the inverse of some block, which is small; powers of
    `lower` are not.
    """
    i = tl.arange(0, lower.shape[0])
    inverse = tl.where(i[:, None] == i[None], 1.0, 0.0) - tl.where(i[:, None] == (i ^ 1)[None], lower, 0.0)
    for level in tl.static_range(1, LEVELS):
        between = tl.where((i >> level)[:, None] == ((i >> level) ^ 1)[None], lower, 0.0).to(SOLVE)
        blocks = inverse.to(SOLVE)
        left = tl.dot(blocks, between, input_precision=PRECISION).to(SOLVE)
        inverse -= tl.dot(left, blocks, input_precision=PRECISION)
    return inverse


@triton.jit
def chunk_writes(
    k, v, log_decay, beta, chunks, sums, weights, leaves, totals, inverses, known, missing, num_tokens,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr, SOLVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's errors as a function of the state that enters it: e = missing - known @ state. Grid (M * HV).

    With D_ij = exp(b_i - b_j) and L = tril(D (k k^T) beta_j, -1): missing [M, HV, V, C] = ((I + L)^-1 v)^T and known
    [M, HV, C, K] = (I + L)^-1 (exp(b) k). With KEEP also inverses [M, HV, C, C], for backward. fp32 leaves [M, HV, C]
    are beta exp(total - b), totals [M, HV] exp(total), with total the last b. All is loaded before the inverse is
    computed: what waits here is loads.
    """
    m, h = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ik, iv, ic = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    inside = (start + ic) < end
    number = tl.cast(start, tl.int64) * HV + h + ic * HV
    decay = tl.load(log_decay + number, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(beta + number, mask=inside, other=0.0).to(tl.float32)
    key = chunk_rows(k, start, end, h // (HV // HK), 0, HK, K, ic, ik, False)
    value = chunk_rows(v, start, end, h, 0, HV, V, ic, iv, False)
    b = tl.cumsum(decay, 0)
    total = tl.sum(decay)
    products = tl.dot(key, tl.trans(key), input_precision=PRECISION)
    products *= tl.exp(tl.where(ic[:, None] > ic[None], b[:, None] - b[None], -float("inf")))
    inverse = inverse_of(products * weight[None], LEVELS, SOLVE, PRECISION)
    scaled = (inverse * tl.exp(b)[None]).to(DOT)
    inverse = inverse.to(DOT)
    recall = tl.dot(scaled, key, input_precision=PRECISION)
    error = tl.dot(tl.trans(value), tl.trans(inverse), input_precision=PRECISION)
    n = tl.program_id(0)
    put_block(known, n, 0, ic, ik, recall.to(DOT), C, K, False)
    put_block(missing, n, 0, iv, ic, error.to(DOT), V, C, False)
    if KEEP:
        put_block(inverses, n, 0, ic, ic, inverse, C, C, False)
    number = tl.cast(h, tl.int64) * num_tokens + start + ic
    tl.store(sums + number, b, mask=inside)
    tl.store(weights + number, weight, mask=inside)
    tl.store(leaves + n * C + ic, tl.exp(total - b) * weight)
    tl.store(totals + n, tl.exp(total))


@triton.jit
def pass_states(
    k, leaves, totals, known, missing, errors, bounds, edges, initial, states, final,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, GIVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state through each document: states that enter its chunks, and errors, which may be `missing`'s memory.

    Grid (N * HV * V / BV). bounds int32 [N + 1]: tokens; edges int32 [N + 1]: chunks. initial, final fp32
    [N, HV, K, V]. The state is held transposed: then both products take it and the errors from registers.
    """
    PARTS: tl.constexpr = (V + BV - 1) // BV
    part, h, n = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % HV, tl.program_id(0) // PARTS // HV
    first, last, lo = tl.load(bounds + n), tl.load(bounds + n + 1), tl.load(edges + n)
    ik, iv, ic = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    row = part * BV
    whole = (ik < K)[None] & (row + iv < V)[:, None]
    state = tl.zeros((BV, BK), tl.float32)
    if GIVEN:
        state = tl.load(transposed(initial, n, h, HV, K, V, ik, row + iv), mask=whole, other=0.0).to(tl.float32)
    num_chunks = tl.cdiv(last - first, C)
    upcoming = tl.load(totals + lo * HV + h, mask=num_chunks > 0, other=0.0)
    for c in range(0, num_chunks):
        number = (lo + c) * HV + h
        total = upcoming
        upcoming = tl.load(totals + number + HV, mask=c + 1 < num_chunks, other=0.0)
        recall = block(known, number, 0, 0, ic, ik, C, K, False)
        error = block(missing, number, row, 0, iv, ic, V, C, False).to(tl.float32)
        key = chunk_rows(k, first + c * C, last, h // (HV // HK), 0, HK, K, ic, ik, False)
        leave = tl.load(leaves + number * C + ic)
        rounded = state.to(DOT)
        put_block(states, number, row, iv, ik, rounded, V, K, False)
        error -= tl.dot(rounded, tl.trans(recall), input_precision=PRECISION)
        put_block(errors, number, row, iv, ic, error.to(DOT), V, C, False)
        state *= total
        state += tl.dot((error * leave[None]).to(DOT), key, input_precision=PRECISION)
    tl.store(transposed(final, n, h, HV, K, V, ik, row + iv), state, mask=whole)


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
    ik, iv, ic = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    inside = (start + ic) < end
    query = chunk_rows(q, start, end, i // (H // HQ), 0, HQ, K, ic, ik, False)
    key = chunk_rows(k, start, end, i // (H // HK), 0, HK, K, ic, ik, False)
    number = tl.cast(h, tl.int64) * num_tokens + start + ic
    b = tl.load(sums + number, mask=inside, other=0.0)
    weight = tl.load(weights + number, mask=inside, other=0.0)
    state = block(states, m * HV + h, part * BV, 0, iv, ik, V, K, False)
    error = block(errors, m * HV + h, part * BV, 0, iv, ic, V, C, False)
    out = tl.dot(query, tl.trans(state), input_precision=PRECISION) * tl.exp(b)[:, None]
    causal = (ic[:, None] >= ic[None]) & inside[:, None]
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * weight[None]
    scores *= tl.exp(tl.where(causal, b[:, None] - b[None], -float("inf")))
    out += tl.dot(scores.to(DOT), tl.trans(error), input_precision=PRECISION)
    iv += part * BV
    values = within(start + ic, iv, end, V)
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
