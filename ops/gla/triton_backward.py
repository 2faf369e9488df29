"""Kernels of gated linear attention, backward. Legend as in triton_forward.

`leaving` [M, H, K, V] holds the gradient of the state behind each chunk, `states` the state that enters it. dscores is
the gradient of the products of queries and keys.
"""

import triton
import triton.language as tl

from ops.gla.triton_forward import (
    exponents,
    for_heads,
    is_strong,
    of_heads,
    put,
    put_heads,
    state_tile,
    tile,
    tokens_of,
)


@triton.jit
def chunk_gradients(
    q, sums, do, chunks, added, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, PV: tl.constexpr,
    PARTS: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the state that enters each chunk, through its own outputs alone. Grid (M * PARTS, H)."""
    m, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ik, iv, tokens = tl.arange(0, BK), part * PV + tl.arange(0, PV), start + tl.arange(0, C)
    grow = (tl.exp(tile(sums, tokens, end, H * K, h * K, ik, K)) * scale).to(DOT)
    grad = tl.zeros((BK, PV), tl.float32)
    for head in range(0, G):
        query = of_heads(q, tokens, end, h, head, ik, H, G, K, 1).to(DOT) * grow
        dout = of_heads(do, tokens, end, h, head, iv, H, G, V, 1).to(DOT)
        grad += tl.dot(tl.trans(query), dout, input_precision=PRECISION)
    place = added + (m * H + h).to(tl.int64) * (K * V) + ik[:, None] * V + iv[None]
    tl.store(place, grad, mask=(ik < K)[:, None] & (iv < V)[None])


@triton.jit
def _block_query_gradients(
    q, k, v, log_decay, sums, do, states, dq, qdq, scale, m, start, end, h, part, first,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ik, iv, ic = part * PK + tl.arange(0, PK), tl.arange(0, BV), tl.arange(0, C)
    tokens = start + first + tl.arange(0, R)
    of_keys, of_queries, of_state = exponents(sums, log_decay, start, end, h, first, ik, H, K, C, R)
    key = (tile(k, start + ic, end, H * K, h * K, ik, K) * tl.exp(of_keys)).to(DOT)
    value = tile(v, start + ic, end, H * V, h * V, iv, V).to(DOT)
    state = (state_tile(states, m * H + h, ik, iv, K, V) * tl.exp(of_state)[:, None]).to(DOT)
    grow = for_heads(tl.exp(of_queries) * scale, P)
    causal = tokens_of(tokens, P)[:, None] >= start + ic[None]
    product = tl.zeros((P * R, PK), tl.float32)
    for head in range(0, G, P):
        dout = of_heads(do, tokens, end, h, head, iv, H, G, V, P).to(DOT)
        dscores = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        dscores = tl.where(causal, dscores, 0.0).to(DOT)
        grad = tl.dot(dout, tl.trans(state), input_precision=PRECISION)
        grad = tl.dot(dscores, key, grad, input_precision=PRECISION)
        query = of_heads(q, tokens, end, h, head, ik, H, G, K, P).to(DOT) * grow.to(DOT)
        product += query.to(tl.float32) * grad
        put_heads(dq, grad * grow, tokens, end, h, head, ik, H, G, K, P)
    if P > 1:
        product = tl.sum(tl.reshape(product, (P, R, PK)), 0)
    put(qdq, product, tokens, end, H * K, h * K, ik, K)


@triton.jit
def query_gradients(
    q, k, v, log_decay, sums, do, chunks, states, dq, qdq, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PK: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and qdq fp32 [T, H, K]: q * dq summed over the query heads. Parts are of K. Grid (M * PARTS, H)."""
    m, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    if is_strong(sums, start, end, h, H, K, BK, C):
        for first in tl.range(0, end - start, R, num_stages=1):
            _block_query_gradients(
                q, k, v, log_decay, sums, do, states, dq, qdq, scale, m, start, end, h, part, first,
                H, G, K, V, PK, BV, C, R, P, DOT, PRECISION,
            )  # fmt: skip
    else:
        _block_query_gradients(
            q, k, v, log_decay, sums, do, states, dq, qdq, scale, m, start, end, h, part, 0,
            H, G, K, V, PK, BV, C, C, 1, DOT, PRECISION,
        )  # fmt: skip


@triton.jit
def _block_key_gradients(
    q, k, v, log_decay, sums, do, scale, start, end, h, part, first, dkey, taken,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what R queries of the chunk contribute to dk, and to taken, which is k * dk."""
    ik, iv, ic = part * PK + tl.arange(0, PK), tl.arange(0, BV), tl.arange(0, C)
    tokens = start + first + tl.arange(0, R)
    of_keys, of_queries, _ = exponents(sums, log_decay, start, end, h, first, ik, H, K, C, R)
    value = tile(v, start + ic, end, H * V, h * V, iv, V).to(DOT)
    grow = for_heads((tl.exp(of_queries) * scale).to(DOT), P)
    causal = start + ic[:, None] <= tokens_of(tokens, P)[None]
    grad = tl.zeros((C, PK), tl.float32)
    for head in range(0, G, P):
        dout = of_heads(do, tokens, end, h, head, iv, H, G, V, P).to(DOT)
        dscores = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
        dscores = tl.where(causal, dscores, 0.0).to(DOT)
        query = of_heads(q, tokens, end, h, head, ik, H, G, K, P).to(DOT) * grow
        grad = tl.dot(dscores, query, grad, input_precision=PRECISION)
    factor = tl.exp(of_keys)
    rounded = (tile(k, start + ic, end, H * K, h * K, ik, K) * factor).to(DOT)
    return dkey + factor * grad, taken + rounded.to(tl.float32) * grad


@triton.jit
def key_gradients(
    q, k, v, log_decay, sums, do, qdq, chunks, totals, states, leaving, dk, dg, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PK: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and the gradient of log_decay. Parts are of K. Grid (M * PARTS, H).

    log_decay_t scales all that passes from before t to t or later. Its gradient is what crosses the whole chunk, plus
    k * dk through later chunks for keys before t, plus q * dq - k * dk inside the chunk for tokens from t on. What a
    token gives to itself is in both of the last with the same rounding, and cancels.
    """
    m, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ik, iv, tokens = part * PK + tl.arange(0, PK), tl.arange(0, BV), start + tl.arange(0, C)
    total = tl.load(totals + (m * H + h).to(tl.int64) * K + ik, mask=ik < K, other=0.0)
    grad_state = state_tile(leaving, m * H + h, ik, iv, K, V).to(tl.float32)
    crossing = tl.exp(total) * tl.sum(grad_state * state_tile(states, m * H + h, ik, iv, K, V).to(tl.float32), 1)
    dkey, taken = tl.zeros((C, PK), tl.float32), tl.zeros((C, PK), tl.float32)
    if is_strong(sums, start, end, h, H, K, BK, C):
        for first in tl.range(0, end - start, R, num_stages=1):
            dkey, taken = _block_key_gradients(
                q, k, v, log_decay, sums, do, scale, start, end, h, part, first, dkey, taken,
                H, G, K, V, PK, BV, C, R, P, DOT, PRECISION,
            )  # fmt: skip
    else:
        dkey, taken = _block_key_gradients(
            q, k, v, log_decay, sums, do, scale, start, end, h, part, 0, dkey, taken,
            H, G, K, V, PK, BV, C, C, 1, DOT, PRECISION,
        )  # fmt: skip
    value = tile(v, tokens, end, H * V, h * V, iv, V).to(DOT)
    grad_state = state_tile(leaving, m * H + h, ik, iv, K, V).to(DOT)
    through = tl.dot(value, tl.trans(grad_state), input_precision=PRECISION)
    through *= tl.exp(total[None] - tile(sums, tokens, end, H * K, h * K, ik, K))
    put(dk, dkey + through, tokens, end, H * K, h * K, ik, K)
    change = tile(qdq, tokens, end, H * K, h * K, ik, K) - taken
    steps = tile(k, tokens, end, H * K, h * K, ik, K).to(tl.float32) * through - change
    dlog = (crossing + tl.sum(change, 0))[None] + tl.cumsum(steps, 0) - steps
    put(dg, dlog, tokens, end, H * K, h * K, ik, K)


@triton.jit
def _block_value_gradients(
    q, k, log_decay, sums, do, scale, start, end, h, part, first, dvalue,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, PV: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ik, iv, ic = tl.arange(0, BK), part * PV + tl.arange(0, PV), tl.arange(0, C)
    tokens = start + first + tl.arange(0, R)
    of_keys, of_queries, _ = exponents(sums, log_decay, start, end, h, first, ik, H, K, C, R)
    key = (tile(k, start + ic, end, H * K, h * K, ik, K) * tl.exp(of_keys)).to(DOT)
    grow = for_heads((tl.exp(of_queries) * scale).to(DOT), P)
    causal = start + ic[:, None] <= tokens_of(tokens, P)[None]
    for head in range(0, G, P):
        query = of_heads(q, tokens, end, h, head, ik, H, G, K, P).to(DOT) * grow
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        scores = tl.where(causal, scores, 0.0).to(DOT)
        dout = of_heads(do, tokens, end, h, head, iv, H, G, V, P).to(DOT)
        dvalue = tl.dot(scores, dout, dvalue, input_precision=PRECISION)
    return dvalue


@triton.jit
def value_gradients(
    q, k, log_decay, sums, do, chunks, totals, leaving, dv, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PV: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv. Parts are of V. Grid (M * PARTS, H)."""
    m, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ik, iv, tokens = tl.arange(0, BK), part * PV + tl.arange(0, PV), start + tl.arange(0, C)
    total = tl.load(totals + (m * H + h).to(tl.int64) * K + ik, mask=ik < K, other=0.0)
    left = tl.exp(total[None] - tile(sums, tokens, end, H * K, h * K, ik, K))
    left = (tile(k, tokens, end, H * K, h * K, ik, K) * left).to(DOT)
    dvalue = tl.dot(left, state_tile(leaving, m * H + h, ik, iv, K, V).to(DOT), input_precision=PRECISION)
    if is_strong(sums, start, end, h, H, K, BK, C):
        for first in tl.range(0, end - start, R, num_stages=1):
            dvalue = _block_value_gradients(
                q, k, log_decay, sums, do, scale, start, end, h, part, first, dvalue,
                H, G, K, V, BK, PV, C, R, P, DOT, PRECISION,
            )  # fmt: skip
    else:
        dvalue = _block_value_gradients(
            q, k, log_decay, sums, do, scale, start, end, h, part, 0, dvalue,
            H, G, K, V, BK, PV, C, C, 1, DOT, PRECISION,
        )  # fmt: skip
    put(dv, dvalue, tokens, end, H * V, h * V, iv, V)
