"""Kernels of attention for Hopper in Gluon, Triton's lower level: tiles copied by the tensor memory accelerator into a
ring of slots, and matrix products that run while the softmax of another tile is computed.

They do what triton_backward does (legend there), for one row (B = 1), head sizes of 64 and 128, bf16
and fp16. All warps do the same work: two matrix products are in flight where the plain kernels wait for each, and the
waits below say which. A slot is filled again only behind a barrier that every warp reaches after its last product from
that slot. Tiles of keys (or queries) stand side by side from the first one seen; those at the edges are masked.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def ring(NUM: gl.constexpr):
    """NUM barriers, each awaiting one fill of its slot."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def fill(x, y, token, other_token, head, X: gl.constexpr, Y: gl.constexpr, x_slot, y_slot, barrier, wanted):
    """Start copying a tile of one head of x [T, H, X] from token on, and one of y; barrier completes with both."""
    mbarrier.expect(barrier, x.block_type.nbytes + y.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(x, [token, head * X], barrier, x_slot, pred=wanted)
    tma.async_copy_global_to_shared(y, [other_token, head * Y], barrier, y_slot, pred=wanted)


@gluon.jit
def key_tiles(first, start, num_queries, ahead, M: gl.constexpr, N: gl.constexpr):
    """(first key, tiles at the left edge, first key behind the whole tiles, number of tiles) of M queries."""
    last = gl.minimum(start + M, num_queries) - 1
    left = gl.load(first + start)
    num_left = gl.cdiv(gl.load(first + last) - left, N)
    inner = left + num_left * N
    right = inner + gl.maximum(ahead + start + 1 - inner, 0) // N * N
    num_right = gl.cdiv(gl.maximum(ahead + last + 1 - right, 0), N)
    return left, num_left, right, num_left + (right - inner) // N + num_right


@gluon.jit
def query_gradients(
    q, k, v, o, do, do_tiles, first, lse, dlse, delta, dq, scale, num_queries, num_tokens,
    HQ: gl.constexpr, HK: gl.constexpr, K: gl.constexpr, V: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    DLSE: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """See triton_backward.query_gradients. Weights are computed while do . v is multiplied."""
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, N, 16])
    by_size: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, K, 16])
    left_side: gl.constexpr = gl.DotOperandLayout(0, by_size, 2)
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [num_warps, 1], [1, 0])
    read: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [num_warps, 1], [1, 0])
    program, ahead = gl.program_id(0), num_tokens - num_queries
    head, start = program % HQ, (gl.cdiv(num_queries, M) - 1 - program // HQ) * M
    key_head, base = head // (HQ // HK), scale * LOG2E
    left, num_left, right, num_tiles = key_tiles(first, start, num_queries, ahead, M, N)
    q_slot = gl.allocate_shared_memory(q.dtype, [M, K], q.layout)
    do_slot = gl.allocate_shared_memory(q.dtype, [M, V], do_tiles.layout)
    k_slots = gl.allocate_shared_memory(k.dtype, [STAGES, N, K], k.layout)
    v_slots = gl.allocate_shared_memory(v.dtype, [STAGES, N, V], v.layout)
    q_full, full = ring(1), ring(STAGES)
    gl.thread_barrier()
    fill(q, do_tiles, start, start, head, K, V, q_slot, do_slot, q_full.index(0), True)
    for i in gl.static_range(STAGES):
        n = left + i * N
        fill(k, v, n, n, key_head, K, V, k_slots.index(i), v_slots.index(i), full.index(i), i < num_tiles)
    token = start + gl.arange(0, M, layout=gl.SliceLayout(1, read))
    whole = gl.expand_dims(token < num_queries, 1)
    place = gl.expand_dims((token.to(gl.int64) * HQ + head) * V, 1)
    place += gl.expand_dims(gl.arange(0, V, layout=gl.SliceLayout(0, read)), 0)
    out, grad = gl.load(o + place, mask=whole, other=0.0), gl.load(do + place, mask=whole, other=0.0)
    shift = gl.sum(out.to(gl.float32) * grad.to(gl.float32), 1)
    if DLSE:
        shift -= gl.load(dlse + token.to(gl.int64) * HQ + head, mask=token < num_queries, other=0.0)
    gl.store(delta + head.to(gl.int64) * num_queries + token, shift, mask=token < num_queries)
    shift = gl.expand_dims(gl.convert_layout(shift, gl.SliceLayout(1, by_key)), 1)
    t = start + gl.arange(0, M, layout=gl.SliceLayout(1, by_key))
    column = gl.arange(0, N, layout=gl.SliceLayout(0, by_key))
    from_key = gl.load(first + t, mask=t < num_queries, other=0)
    top = gl.load(lse + head.to(gl.int64) * num_queries + t, mask=t < num_queries, other=float("inf"))
    top, own_key = gl.expand_dims(top, 1), ahead + t
    acc = warpgroup_mma_init(gl.full([M, K], 0.0, gl.float32, layout=by_size))
    zeros = gl.full([M, N], 0.0, gl.float32, layout=by_key)
    mbarrier.wait(q_full.index(0), 0)
    for j in range(0, num_tiles):
        slot = j % STAGES
        mbarrier.wait(full.index(slot), j // STAGES & 1)
        score_product = warpgroup_mma(q_slot, k_slots.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        value_product = warpgroup_mma(do_slot, v_slots.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[score_product])
        weights = gl.exp2(scores * base - top)
        n = left + j * N
        if (j < num_left) | (n >= right):
            key = gl.expand_dims(n + column, 0)
            weights = gl.where((key >= gl.expand_dims(from_key, 1)) & (key <= gl.expand_dims(own_key, 1)), weights, 0.0)
        from_value = warpgroup_mma_wait(0, deps=[value_product])
        from_score = gl.convert_layout((weights * (from_value - shift)).to(k.dtype), left_side)
        acc = warpgroup_mma(from_score, k_slots.index(slot), acc, is_async=True)
        # Products of the tile before are done: its slots may be filled again once every warp is here.
        gl.thread_barrier()
        old, at = (j - 1 + STAGES) % STAGES, left + (j - 1 + STAGES) * N
        wanted = (j > 0) & (j - 1 + STAGES < num_tiles)
        fill(k, v, at, at, key_head, K, V, k_slots.index(old), v_slots.index(old), full.index(old), wanted)
    acc = warpgroup_mma_wait(0, deps=[acc])
    token = start + gl.arange(0, M, layout=gl.SliceLayout(1, stored))
    place = gl.expand_dims((token.to(gl.int64) * HQ + head) * K, 1)
    place += gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, stored)), 0)
    gl.store(
        dq + place, gl.convert_layout((acc * scale).to(dq.dtype.element_ty), stored),
        mask=gl.expand_dims(token < num_queries, 1),
    )  # fmt: skip


@gluon.jit
def copy_statistics(lse, delta, place, lse_slot, delta_slot, wanted, M: gl.constexpr, num_warps: gl.constexpr):
    """Start copying lse and delta of M queries from place on."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    i = gl.arange(0, M, layout=flat)
    inside = (i >= 0) & wanted
    async_copy.async_copy_global_to_shared(lse_slot, lse + place + i, mask=inside)
    async_copy.async_copy_global_to_shared(delta_slot, delta + place + i, mask=inside)
    async_copy.commit_group()


@gluon.jit
def next_tile(token, head, start, end, M: gl.constexpr):
    """The tile behind this one, or the first of the next head."""
    wraps = token + M == end
    return gl.where(wraps, start, token + M), gl.where(wraps, head + 1, head)


@gluon.jit
def key_gradients(
    q, k, v, do, last, lse, delta, dk, dv, scale, num_queries, num_tokens, padded_queries,
    HQ: gl.constexpr, HK: gl.constexpr, K: gl.constexpr, V: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """See triton_backward.key_gradients. Weights are computed while do . v is multiplied, gradients of scores while dv
    is. One loop over the query tiles of all query heads. lse and delta are [HQ, padded_queries], whole tiles."""
    by_query: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, M, 16])
    by_size: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, K, 16])
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, V, 16])
    stored_k: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [num_warps, 1], [1, 0])
    stored_v: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [num_warps, 1], [1, 0])
    program = gl.program_id(0)
    head, part, start = program % HK, program // HK % PARTS, program // (HK * PARTS) * N
    final = gl.minimum(start + N, num_tokens) - 1
    own = start - (num_tokens - num_queries)  # query of the first key, negative before the first query
    begin = gl.maximum(own, 0)
    num_left = gl.cdiv(gl.maximum(final - start + own - begin, 0), M)
    inner = begin + num_left * M
    num_whole = num_left + gl.maximum(gl.load(last + start) + 1 - inner, 0) // M
    right = begin + num_whole * M
    num_tiles = num_whole + gl.cdiv(gl.maximum(gl.load(last + final) + 1 - right, 0), M)
    behind = begin + num_tiles * M
    group: gl.constexpr = HQ // HK
    head_from = head * group + part * group // PARTS
    num_steps = (head * group + (part + 1) * group // PARTS - head_from) * num_tiles
    k_slot = gl.allocate_shared_memory(k.dtype, [N, K], k.layout)
    v_slot = gl.allocate_shared_memory(v.dtype, [N, V], v.layout)
    q_slots = gl.allocate_shared_memory(q.dtype, [STAGES, M, K], q.layout)
    do_slots = gl.allocate_shared_memory(q.dtype, [STAGES, M, V], do.layout)
    lse_slots = gl.allocate_shared_memory(gl.float32, [STAGES, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    delta_slots = gl.allocate_shared_memory(gl.float32, [STAGES, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full, full = ring(1), ring(STAGES)
    gl.thread_barrier()
    fill(k, v, start, start, head, K, V, k_slot, v_slot, k_full.index(0), True)
    at, query_head = begin, head_from  # of the next copy
    for i in gl.static_range(STAGES - 1):
        fill(q, do, at, at, query_head, K, V, q_slots.index(i), do_slots.index(i), full.index(i), i < num_steps)
        place = query_head.to(gl.int64) * padded_queries + at
        copy_statistics(lse, delta, place, lse_slots.index(i), delta_slots.index(i), i < num_steps, M, num_warps)
        at, query_head = next_tile(at, query_head, begin, behind, M)
    row = start + gl.arange(0, N, layout=gl.SliceLayout(1, by_query))
    column = gl.arange(0, M, layout=gl.SliceLayout(0, by_query))
    last_query = gl.load(last + row, mask=row < num_tokens, other=-1)
    own_query = own + gl.arange(0, N, layout=gl.SliceLayout(1, by_query))
    base = scale * LOG2E
    acc_k = warpgroup_mma_init(gl.full([N, K], 0.0, gl.float32, layout=by_size))
    acc_v = warpgroup_mma_init(gl.full([N, V], 0.0, gl.float32, layout=by_value))
    zeros = gl.full([N, M], 0.0, gl.float32, layout=by_query)
    mbarrier.wait(k_full.index(0), 0)
    slot, phase, now = 0, 0, begin
    for i in range(0, num_steps):
        mbarrier.wait(full.index(slot), phase)
        score_product = warpgroup_mma(k_slot, q_slots.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        value_product = warpgroup_mma(v_slot, do_slots.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[score_product])
        async_copy.wait_group(STAGES - 2)
        # Every warp is done with the step before, whose slots may be filled again, and has copied its statistics.
        gl.thread_barrier()
        top = lse_slots.index(slot).load(gl.SliceLayout(0, by_query))
        weights = gl.exp2(scores * base - gl.expand_dims(top, 0))
        if (now < inner) | (now >= right):
            query = gl.expand_dims(now + column, 0)
            weights = gl.where(
                (query >= gl.expand_dims(own_query, 1)) & (query <= gl.expand_dims(last_query, 1)), weights, 0.0
            )
        seen_weights = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, by_value, 2))
        acc_v = warpgroup_mma(seen_weights, do_slots.index(slot), acc_v, is_async=True)
        shift = delta_slots.index(slot).load(gl.SliceLayout(0, by_query))
        old, wanted = gl.where(slot == 0, STAGES - 1, slot - 1), i + STAGES - 1 < num_steps
        fill(q, do, at, at, query_head, K, V, q_slots.index(old), do_slots.index(old), full.index(old), wanted)
        place = query_head.to(gl.int64) * padded_queries + at
        copy_statistics(lse, delta, place, lse_slots.index(old), delta_slots.index(old), wanted, M, num_warps)
        at, query_head = next_tile(at, query_head, begin, behind, M)
        from_value = warpgroup_mma_wait(1, deps=[value_product])
        from_score = weights * (from_value - gl.expand_dims(shift, 0))
        from_score = gl.convert_layout(from_score.to(q.dtype), gl.DotOperandLayout(0, by_size, 2))
        acc_k = warpgroup_mma(from_score, q_slots.index(slot), acc_k, is_async=True)
        now = gl.where(now + M == behind, begin, now + M)
        phase = gl.where(slot == STAGES - 1, phase ^ 1, phase)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    acc_k, acc_v = warpgroup_mma_wait(0, deps=[acc_k, acc_v])
    token = start + gl.arange(0, N, layout=gl.SliceLayout(1, stored_k))
    place = gl.expand_dims(((part * num_tokens + token).to(gl.int64) * HK + head) * K, 1)
    place += gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, stored_k)), 0)
    acc_k = gl.convert_layout((acc_k * scale).to(dk.dtype.element_ty), stored_k)
    gl.store(dk + place, acc_k, mask=gl.expand_dims(token < num_tokens, 1))
    token = start + gl.arange(0, N, layout=gl.SliceLayout(1, stored_v))
    place = gl.expand_dims(((part * num_tokens + token).to(gl.int64) * HK + head) * V, 1)
    place += gl.expand_dims(gl.arange(0, V, layout=gl.SliceLayout(0, stored_v)), 0)
    gl.store(
        dv + place,
        gl.convert_layout(acc_v.to(dv.dtype.element_ty), stored_v),
        mask=gl.expand_dims(token < num_tokens, 1),
    )
