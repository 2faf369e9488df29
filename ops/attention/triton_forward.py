"""Kernel of attention, forward: online softmax over the keys first[t] .. ahead + t of query t, and over sink keys.

Shape legend: B rows, T tokens with a key each, of which the last Q have queries (ahead = T - Q stand before them), HQ
query and HK key heads, K and V head sizes (BK, BV padded to powers of two), S sinks; M queries and N keys a tile.
Tensors of queries are [B, Q, H, size], of keys [B, T, H, size], with one stride per token, rows one behind the other.
Queries count from 0. first [Q] never decreases, so a tile of queries sees one range of keys, and the keys that all of
its queries see are one range: the keys at the two edges are visited first, with a mask, and those in between without.
Statistics are base-2 logarithms.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_of(
    x, row, token, num_tokens, head, stride,
    SIZE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BT, BD] of one head from token on; zeros behind the row's end. x is a tensor descriptor with TMA."""
    if TMA:
        tile = tl.reshape(x.load([row, token, head * SIZE]), (BT, BD))
    else:
        t, i = token + tl.arange(0, BT), tl.arange(0, BD)
        place = ((row * num_tokens + t).to(tl.int64) * stride + head * SIZE)[:, None] + i[None]
        tile = tl.load(x + place, mask=(t < num_tokens)[:, None] & (i < SIZE)[None], other=0.0)
    return tile


@triton.jit
def visible_range(first, start, num_queries, ahead, M: tl.constexpr, N: tl.constexpr):
    """(keys from, seen by all from, to, number of tiles at the left edge, of all at the edges) of M queries.

    Tiles of N keys: those at the left edge, then whole ones seen by every query, then the rest up to the last query.
    """
    last = tl.minimum(start + M, num_queries) - 1
    left = tl.load(first + start)
    num_left = tl.cdiv(tl.load(first + last) - left, N)
    inner = left + num_left * N
    right = inner + tl.maximum(ahead + start + 1 - inner, 0) // N * N
    return left, inner, right, num_left, num_left + tl.cdiv(tl.maximum(ahead + last + 1 - right, 0), N)


@triton.jit
def attend(query, key, value, seen, top, total, acc, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys added to the softmax: running maximum and sum [M], output [M, BV]."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    shift = higher
    if MASKED:  # a query that has seen no key so far
        shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def outputs(
    q, k, v, sink_k, sink_v, first, o, lse, scale, num_queries, num_tokens, num_sinks, stride_q, stride_k, stride_v,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SINKS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [B, Q, HQ, V] and the base-2 lse [B, HQ, Q]. Grid (HQ * Q / M * B): heads fastest, late queries first."""
    program, num_blocks, ahead = tl.program_id(0), tl.cdiv(num_queries, M), num_tokens - num_queries
    head, row = program % HQ, program // HQ // num_blocks
    start = (num_blocks - 1 - program // HQ % num_blocks) * M
    t, iv = start + tl.arange(0, M), tl.arange(0, BV)
    from_key = tl.load(first + t, mask=t < num_queries, other=0)
    left, inner, right, num_left, num_edges = visible_range(first, start, num_queries, ahead, M, N)
    key_head, scale = head // (HQ // HK), scale * LOG2E
    query = tile_of(q, row, start, num_queries, head, stride_q, K, M, BK, TMA)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, BV), tl.float32)
    if SINKS:
        for s in range(0, num_sinks, N):
            key = tile_of(sink_k, 0, s, num_sinks, key_head, HK * K, K, N, BK, False)
            value = tile_of(sink_v, 0, s, num_sinks, key_head, HK * V, V, N, BV, False)
            seen = ((s + tl.arange(0, N)) < num_sinks)[None]
            top, total, acc = attend(query, key, value, seen, top, total, acc, scale, True, PRECISION)
    for edge in range(0, num_edges):
        n = tl.where(edge < num_left, left + edge * N, right + (edge - num_left) * N)
        key = tile_of(k, row, n, num_tokens, key_head, stride_k, K, N, BK, TMA)
        value = tile_of(v, row, n, num_tokens, key_head, stride_v, V, N, BV, TMA)
        place = n + tl.arange(0, N)
        seen = (place[None] >= from_key[:, None]) & (place[None] <= ahead + t[:, None])
        top, total, acc = attend(query, key, value, seen, top, total, acc, scale, True, PRECISION)
    for n in range(inner, right, N):
        key = tile_of(k, row, n, num_tokens, key_head, stride_k, K, N, BK, TMA)
        value = tile_of(v, row, n, num_tokens, key_head, stride_v, V, N, BV, TMA)
        top, total, acc = attend(query, key, value, None, top, total, acc, scale, False, PRECISION)
    inside = t < num_queries
    place = ((row * num_queries + t).to(tl.int64) * HQ + head) * V
    whole = inside[:, None] & (iv < V)[None]
    tl.store(o + place[:, None] + iv[None], (acc / total[:, None]).to(o.dtype.element_ty), mask=whole)
    tl.store(lse + (row * HQ + head).to(tl.int64) * num_queries + t, top + tl.log2(total), mask=inside)
