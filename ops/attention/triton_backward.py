"""Kernels of attention, backward: dq by query tiles, then dk and dv by key tiles; see triton_forward for the legend.

Weights are computed again from the saved log-sum-exp. With delta = rowsum(do * o) - dlse, the gradient of a score is
weight * (do . v - delta). A key is seen by the queries key - ahead (or 0) .. last[key], last [T] non-decreasing and -1
where no query sees the key; one program sums over all query heads of its key head, so no two programs add to one place:
the same bits every time.
"""

import triton
import triton.language as tl

from ops.attention.triton_forward import LOG2E, tile_of, visible_range


@triton.jit
def query_step(query, grad, key, value, seen, lse, delta, acc, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """What one tile of keys adds to dq / scale [M, BK]."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    from_value = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    weights = tl.exp2(scores * scale - lse[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    from_score = weights * (from_value - delta[:, None])
    return tl.dot(from_score.to(key.dtype), key, acc, input_precision=PRECISION)


@triton.jit
def query_gradients(
    q, k, v, sink_k, sink_v, o, do, first, lse, dlse, delta, dq, scale, num_queries, num_tokens, num_sinks,
    stride_q, stride_k, stride_v,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SINKS: tl.constexpr, DLSE: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, Q, HQ, K], and delta fp32 [B, HQ, Q] for the key kernels; dlse [B, Q, HQ]. Grid as outputs."""
    program, num_blocks, ahead = tl.program_id(0), tl.cdiv(num_queries, M), num_tokens - num_queries
    head, row = program % HQ, program // HQ // num_blocks
    start = (num_blocks - 1 - program // HQ % num_blocks) * M
    t, ik, iv = start + tl.arange(0, M), tl.arange(0, BK), tl.arange(0, BV)
    inside = t < num_queries
    from_key = tl.load(first + t, mask=inside, other=0)
    left, inner, right, num_left, num_edges = visible_range(first, start, num_queries, ahead, M, N)
    key_head, base = head // (HQ // HK), scale * LOG2E
    token = (row * num_queries + t).to(tl.int64) * HQ + head
    statistic = (row * HQ + head).to(tl.int64) * num_queries + t
    query = tile_of(q, row, start, num_queries, head, stride_q, K, M, BK, TMA)
    grad = tile_of(do, row, start, num_queries, head, HQ * V, V, M, BV, TMA)
    out = tl.load(o + token[:, None] * V + iv[None], mask=inside[:, None] & (iv < V)[None], other=0.0)
    shift = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if DLSE:
        shift -= tl.load(dlse + token, mask=inside, other=0.0)
    tl.store(delta + statistic, shift, mask=inside)
    top = tl.load(lse + statistic, mask=inside, other=float("inf"))
    acc = tl.zeros((M, BK), tl.float32)
    if SINKS:
        for s in range(0, num_sinks, N):
            key = tile_of(sink_k, 0, s, num_sinks, key_head, HK * K, K, N, BK, False)
            value = tile_of(sink_v, 0, s, num_sinks, key_head, HK * V, V, N, BV, False)
            seen = ((s + tl.arange(0, N)) < num_sinks)[None]
            acc = query_step(query, grad, key, value, seen, top, shift, acc, base, True, PRECISION)
    for edge in range(0, num_edges):
        n = tl.where(edge < num_left, left + edge * N, right + (edge - num_left) * N)
        key = tile_of(k, row, n, num_tokens, key_head, stride_k, K, N, BK, TMA)
        value = tile_of(v, row, n, num_tokens, key_head, stride_v, V, N, BV, TMA)
        place = n + tl.arange(0, N)
        seen = (place[None] >= from_key[:, None]) & (place[None] <= ahead + t[:, None])
        acc = query_step(query, grad, key, value, seen, top, shift, acc, base, True, PRECISION)
    for n in range(inner, right, N):
        key = tile_of(k, row, n, num_tokens, key_head, stride_k, K, N, BK, TMA)
        value = tile_of(v, row, n, num_tokens, key_head, stride_v, V, N, BV, TMA)
        acc = query_step(query, grad, key, value, None, top, shift, acc, base, False, PRECISION)
    place = dq + token[:, None] * K + ik[None]
    tl.store(place, (acc * scale).to(dq.dtype.element_ty), mask=inside[:, None] & (ik < K)[None])


@triton.jit
def key_step(
    q, do, lse, delta, key, value, row, head, start, key_start, last_query, dk, dv, scale, num_queries, stride_q,
    HQ: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, MASKED: tl.constexpr, CHECKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries start .. start + M of one head add to dk / scale [N, BK] and dv [N, BV].

    With MASKED, key n is seen by queries key_start + n .. last_query[n]. Without CHECKED, no query stands behind the
    row's end. Weights are transposed, [N, M].
    """
    t = tl.arange(0, M)
    query = tile_of(q, row, start, num_queries, head, stride_q, K, M, BK, TMA)
    grad = tile_of(do, row, start, num_queries, head, HQ * V, V, M, BV, TMA)
    statistic = (row * HQ + head).to(tl.int64) * num_queries + start
    if CHECKED:
        top = tl.load(lse + statistic + t, mask=t < num_queries - start, other=float("inf"))
        shift = tl.load(delta + statistic + t, mask=t < num_queries - start, other=0.0)
    else:
        top = tl.load(lse + statistic + t)
        shift = tl.load(delta + statistic + t)
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    from_value = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    weights = tl.exp2(scores * scale - top[None])
    if MASKED:
        t, n = start + t, key_start + tl.arange(0, N)
        weights = tl.where((t[None] >= n[:, None]) & (t[None] <= last_query[:, None]), weights, 0.0)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
    from_score = weights * (from_value - shift[None])
    dk = tl.dot(from_score.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_gradients(
    q, k, v, do, last, lse, delta, dk, dv, scale, num_queries, num_tokens, stride_q, stride_k, stride_v,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [PARTS, B, T, HK, K] and dv [PARTS, B, T, HK, V]: the query heads of a key head shared out to PARTS programs.

    Grid (HK * PARTS * T / N * B), early keys first: with a window the late ones have less to do. Keys that no query
    sees get zeros.
    """
    program, num_blocks = tl.program_id(0), tl.cdiv(num_tokens, N)
    head, part = program % HK, program // HK % PARTS
    block = program // (HK * PARTS)
    start, row = block % num_blocks * N, block // num_blocks
    n, ik, iv = start + tl.arange(0, N), tl.arange(0, BK), tl.arange(0, BV)
    inside = n < num_tokens
    key = tile_of(k, row, start, num_tokens, head, stride_k, K, N, BK, TMA)
    value = tile_of(v, row, start, num_tokens, head, stride_v, V, N, BV, TMA)
    last_query = tl.load(last + n, mask=inside, other=-1)
    final = tl.minimum(start + N, num_tokens) - 1
    # Query tiles: at the diagonal, then whole ones that see every key, then the rest up to the last query.
    ahead = num_tokens - num_queries
    begin = tl.maximum(start - ahead, 0)
    num_left = tl.cdiv(tl.maximum(final - ahead - begin, 0), M)
    inner = begin + num_left * M
    num_inner = tl.maximum(tl.load(last + start) + 1 - inner, 0) // M
    right = inner + num_inner * M
    num_edges = num_left + tl.cdiv(tl.maximum(tl.load(last + final) + 1 - right, 0), M)
    group = HQ // HK
    head_from = head * group + part * group // PARTS
    num_heads = head * group + (part + 1) * group // PARTS - head_from
    base = scale * LOG2E
    acc_k = tl.zeros((N, BK), tl.float32)
    acc_v = tl.zeros((N, BV), tl.float32)
    for i in range(0, num_heads * num_edges):
        edge = i % num_edges
        at = tl.where(edge < num_left, inner, right) + (edge - num_left) * M
        acc_k, acc_v = key_step(
            q, do, lse, delta, key, value, row, head_from + i // num_edges, at, start - ahead, last_query, acc_k, acc_v,
            base, num_queries, stride_q, HQ, K, V, BK, BV, M, N, True, True, TMA, PRECISION,
        )  # fmt: skip
    for i in range(0, num_heads * num_inner):
        acc_k, acc_v = key_step(
            q, do, lse, delta, key, value, row, head_from + i // num_inner, inner + i % num_inner * M, 0, None,
            acc_k, acc_v, base, num_queries, stride_q, HQ, K, V, BK, BV, M, N, False, False, TMA, PRECISION,
        )  # fmt: skip
    num_rows = tl.num_programs(0) // (HK * PARTS * num_blocks)
    token = (((part * num_rows + row) * num_tokens + n).to(tl.int64) * HK + head)[:, None]
    acc_k = (acc_k * scale).to(dk.dtype.element_ty)
    tl.store(dk + token * K + ik[None], acc_k, mask=inside[:, None] & (ik < K)[None])
    tl.store(dv + token * V + iv[None], acc_v.to(dv.dtype.element_ty), mask=inside[:, None] & (iv < V)[None])


@triton.jit
def sink_gradients(
    q, sink_k, sink_v, do, lse, delta, dk, dv, scale, num_rows, num_queries, num_sinks, stride_q,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums dk fp32 [P, S, HK, K] and dv [P, S, HK, V]; program p of P takes a share of the query tiles of all
    rows and of all query heads of its key head. Grid (P, HK, S / N)."""
    part, num_parts, head, start = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.program_id(2) * N
    n, ik, iv = start + tl.arange(0, N), tl.arange(0, BK), tl.arange(0, BV)
    key = tile_of(sink_k, 0, start, num_sinks, head, HK * K, K, N, BK, False)
    value = tile_of(sink_v, 0, start, num_sinks, head, HK * V, V, N, BV, False)
    num_blocks, group = tl.cdiv(num_queries, M), HQ // HK
    tiles = num_rows * group * num_blocks
    share = tl.cdiv(tiles, num_parts)
    base = scale * LOG2E
    acc_k = tl.zeros((N, BK), tl.float32)
    acc_v = tl.zeros((N, BV), tl.float32)
    for i in range(part * share, tl.minimum((part + 1) * share, tiles)):
        of_heads = i // num_blocks
        acc_k, acc_v = key_step(
            q, do, lse, delta, key, value, of_heads // group, head * group + of_heads % group, i % num_blocks * M,
            0, None, acc_k, acc_v, base, num_queries, stride_q, HQ, K, V, BK, BV, M, N, False, True, TMA, PRECISION,
        )  # fmt: skip
    place = ((part * num_sinks + n) * HK + head)[:, None]
    inside = (n < num_sinks)[:, None]
    tl.store(dk + place * K + ik[None], acc_k * scale, mask=inside & (ik < K)[None])
    tl.store(dv + place * V + iv[None], acc_v, mask=inside & (iv < V)[None])
