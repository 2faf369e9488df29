"""Kernels of gated linear attention, backward: gradients of states, of queries, of keys, values and decays.

Shape legend and boundaries as in triton_forward. `grads` holds at each boundary the gradient of the state there.
"""

import triton
import triton.language as tl

from ops.gla.triton_forward import cumulated, rows_of


@triton.jit
def segment_gradients(
    q, log_decay, do, segments, grads, scale,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the state that enters each segment, through this segment's outputs alone. Grid (M, H, V / BV)."""
    m, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, n = tl.load(segments + m * 3), tl.load(segments + m * 3 + 1), tl.load(segments + m * 3 + 2)
    ik, iv, ic, ir = tl.arange(0, BK), part * BV + tl.arange(0, BV), tl.arange(0, C), tl.arange(0, C * P)
    grad = tl.zeros((BK, BV), tl.float32)
    so_far = tl.zeros((BK,), tl.float32)
    for t in range(start, end, C):
        keys = ((t + ic) < end)[:, None] & (ik < K)[None]
        token = ((t + ic).to(tl.int64) * H + h)[:, None]
        g = tl.load(log_decay + token * K + ik[None], mask=keys, other=0.0).to(tl.float32)
        row = (((t + ir // P).to(tl.int64) * H + h) * G + ir % P)[:, None]
        rows = ((t + ir // P) < end) & (ir % P < G)
        query = tl.load(q + row * K + ik[None], mask=rows[:, None] & (ik < K)[None], other=0.0).to(tl.float32) * scale
        dout = tl.load(do + row * V + iv[None], mask=rows[:, None] & (iv < V)[None], other=0.0).to(DOT)
        entered = (query * rows_of(tl.exp(so_far[None] + tl.cumsum(g, 0)), P)).to(DOT)
        grad += tl.dot(tl.trans(entered), dout, input_precision=PRECISION)
        so_far += tl.sum(g, 0)
    place = grads + ((m + n).to(tl.int64) * H + h) * K * V
    tl.store(place + ik[:, None] * V + iv[None], grad, mask=(ik < K)[:, None] & (iv < V)[None])


@triton.jit
def query_gradients(
    q, k, v, log_decay, do, segments, states, dq, qdq, scale,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, FLOOR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and qdq fp32 [T, H, K]. Runs forward with the state. Grid (M, H, K / BK).

    qdq is q * dq summed over the query heads, without what comes from the token's own key: no decay lies between them,
    and its rounding would not cancel against the key's.
    """
    m, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, n = tl.load(segments + m * 3), tl.load(segments + m * 3 + 1), tl.load(segments + m * 3 + 2)
    ik, iv, ic, ir = part * BK + tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C), tl.arange(0, C * P)
    place = states + ((m + n).to(tl.int64) * H + h) * K * V
    state = tl.load(place + ik[:, None] * V + iv[None], mask=(ik < K)[:, None] & (iv < V)[None], other=0.0)
    before, same = (ir // P)[:, None] > ic[None], (ir // P)[:, None] == ic[None]
    for t in range(start, end, C):
        inside = (t + ic) < end
        token = ((t + ic).to(tl.int64) * H + h)[:, None]
        keys = inside[:, None] & (ik < K)[None]
        g = tl.load(log_decay + token * K + ik[None], mask=keys, other=0.0).to(tl.float32)
        key = tl.load(k + token * K + ik[None], mask=keys, other=0.0)
        value = tl.load(v + token * V + iv[None], mask=inside[:, None] & (iv < V)[None], other=0.0).to(DOT)
        row = (((t + ir // P).to(tl.int64) * H + h) * G + ir % P)[:, None]
        rows = ((t + ir // P) < end) & (ir % P < G)
        query_keys = rows[:, None] & (ik < K)[None]
        dout = tl.load(do + row * V + iv[None], mask=rows[:, None] & (iv < V)[None], other=0.0).to(DOT)
        b, c, middle = cumulated(g, FLOOR)
        all_of_it = tl.sum(g, 0)
        dscores = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        itself = tl.sum(tl.where(same, dscores, 0.0), 1) * scale
        dscores = tl.where(before, dscores, 0.0).to(DOT)
        shrunk = (key * tl.exp(middle[None] - c)).to(DOT)
        grad = rows_of(tl.exp(c - middle[None]) * scale, P) * tl.dot(dscores, shrunk, input_precision=PRECISION)
        through_state = tl.dot(dout, tl.trans(state.to(DOT)), input_precision=PRECISION)
        grad += rows_of(tl.exp(b) * scale, P) * through_state
        query = tl.load(q + row * K + ik[None], mask=query_keys, other=0.0).to(tl.float32)
        product = tl.sum(tl.reshape(query * grad, (C, P, BK)), 1)
        tl.store(qdq + token * K + ik[None], product, mask=keys)
        grad += itself[:, None] * rows_of(key.to(tl.float32), P)
        tl.store(dq + row * K + ik[None], grad.to(dq.dtype.element_ty), mask=query_keys)
        left = (key * tl.exp(all_of_it[None] - b)).to(DOT)
        state = state * tl.exp(all_of_it)[:, None] + tl.dot(tl.trans(left), value, input_precision=PRECISION)


@triton.jit
def key_gradients(
    q, k, v, log_decay, do, qdq, segments, states, grads, dk, dg, scale,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, FLOOR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and the gradient of log_decay. Runs backward with the gradient of the state. Grid (M, H, K / BK).

    log_decay_t scales all that passes from before t to t and after: its gradient is the sum of (q dq - k dk) from t to
    the segment's end, and of state * gradient at the boundary there.
    """
    m, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, n = tl.load(segments + m * 3), tl.load(segments + m * 3 + 1), tl.load(segments + m * 3 + 2)
    ik, iv, ic, ir = part * BK + tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C), tl.arange(0, C * P)
    place = ((m + n + 1).to(tl.int64) * H + h) * K * V + ik[:, None] * V + iv[None]
    whole = (ik < K)[:, None] & (iv < V)[None]
    grad_state = tl.load(grads + place, mask=whole, other=0.0)
    later = tl.sum(grad_state * tl.load(states + place, mask=whole, other=0.0), 1)
    before, same = (ir // P)[:, None] > ic[None], (ir // P)[:, None] == ic[None]
    num_blocks = tl.cdiv(end - start, C)
    for block in range(0, num_blocks):
        t = start + (num_blocks - 1 - block) * C
        inside = (t + ic) < end
        token = ((t + ic).to(tl.int64) * H + h)[:, None]
        keys = inside[:, None] & (ik < K)[None]
        g = tl.load(log_decay + token * K + ik[None], mask=keys, other=0.0).to(tl.float32)
        key = tl.load(k + token * K + ik[None], mask=keys, other=0.0)
        value = tl.load(v + token * V + iv[None], mask=inside[:, None] & (iv < V)[None], other=0.0).to(DOT)
        row = (((t + ir // P).to(tl.int64) * H + h) * G + ir % P)[:, None]
        rows = ((t + ir // P) < end) & (ir % P < G)
        query = tl.load(q + row * K + ik[None], mask=rows[:, None] & (ik < K)[None], other=0.0).to(tl.float32) * scale
        dout = tl.load(do + row * V + iv[None], mask=rows[:, None] & (iv < V)[None], other=0.0).to(DOT)
        b, c, middle = cumulated(g, FLOOR)
        all_of_it = tl.sum(g, 0)
        dscores = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        itself = tl.sum(tl.where(same, dscores, 0.0), 1)
        dscores = tl.where(before, dscores, 0.0).to(DOT)
        grown = (query * rows_of(tl.exp(c - middle[None]), P)).to(DOT)
        dkey = tl.exp(middle[None] - c) * tl.dot(tl.trans(dscores), grown, input_precision=PRECISION)
        through_state = tl.dot(value, tl.trans(grad_state.to(DOT)), input_precision=PRECISION)
        dkey += tl.exp(all_of_it[None] - b) * through_state
        change = tl.load(qdq + token * K + ik[None], mask=keys, other=0.0) - key * dkey
        all_change = tl.sum(change, 0)
        dlog = later[None] + all_change[None] - tl.cumsum(change, 0) + change
        tl.store(dg + token * K + ik[None], dlog.to(dg.dtype.element_ty), mask=keys)
        later += all_change
        dkey += tl.sum(tl.reshape(itself[:, None] * query, (C, P, BK)), 1)
        tl.store(dk + token * K + ik[None], dkey.to(dk.dtype.element_ty), mask=keys)
        entered = (query * rows_of(tl.exp(b), P)).to(DOT)
        grad_state = grad_state * tl.exp(all_of_it)[:, None]
        grad_state += tl.dot(tl.trans(entered), dout, input_precision=PRECISION)


@triton.jit
def value_gradients(
    q, k, log_decay, do, segments, grads, dv, scale,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, FLOOR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv. Runs backward with the gradient of the state. Grid (M, H, V / BV)."""
    m, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, n = tl.load(segments + m * 3), tl.load(segments + m * 3 + 1), tl.load(segments + m * 3 + 2)
    ik, iv, ic, ir = tl.arange(0, BK), part * BV + tl.arange(0, BV), tl.arange(0, C), tl.arange(0, C * P)
    place = ((m + n + 1).to(tl.int64) * H + h) * K * V + ik[:, None] * V + iv[None]
    grad_state = tl.load(grads + place, mask=(ik < K)[:, None] & (iv < V)[None], other=0.0)
    causal = (ir // P)[:, None] >= ic[None]
    num_blocks = tl.cdiv(end - start, C)
    for block in range(0, num_blocks):
        t = start + (num_blocks - 1 - block) * C
        inside = (t + ic) < end
        token = ((t + ic).to(tl.int64) * H + h)[:, None]
        keys = inside[:, None] & (ik < K)[None]
        g = tl.load(log_decay + token * K + ik[None], mask=keys, other=0.0).to(tl.float32)
        key = tl.load(k + token * K + ik[None], mask=keys, other=0.0)
        row = (((t + ir // P).to(tl.int64) * H + h) * G + ir % P)[:, None]
        rows = ((t + ir // P) < end) & (ir % P < G)
        query = tl.load(q + row * K + ik[None], mask=rows[:, None] & (ik < K)[None], other=0.0).to(tl.float32) * scale
        dout = tl.load(do + row * V + iv[None], mask=rows[:, None] & (iv < V)[None], other=0.0).to(DOT)
        b, c, middle = cumulated(g, FLOOR)
        all_of_it = tl.sum(g, 0)
        grown = (query * rows_of(tl.exp(c - middle[None]), P)).to(DOT)
        shrunk = (key * tl.exp(middle[None] - c)).to(DOT)
        scores = tl.dot(grown, tl.trans(shrunk), input_precision=PRECISION)
        scores = tl.where(causal, scores, 0.0).to(DOT)
        left = (key * tl.exp(all_of_it[None] - b)).to(DOT)
        dvalue = tl.dot(left, grad_state.to(DOT), input_precision=PRECISION)
        dvalue += tl.dot(tl.trans(scores), dout, input_precision=PRECISION)
        tl.store(dv + token * V + iv[None], dvalue.to(dv.dtype.element_ty), mask=inside[:, None] & (iv < V)[None])
        entered = (query * rows_of(tl.exp(b), P)).to(DOT)
        grad_state = grad_state * tl.exp(all_of_it)[:, None]
        grad_state += tl.dot(tl.trans(entered), dout, input_precision=PRECISION)
