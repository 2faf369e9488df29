"""Kernels of the gated delta rule, backward: gradients of errors and states, then of everything else chunk by chunk.

Legend as in triton_forward. Of a chunk with entering state S, D_ij = exp(b_i - b_j) and L = tril(D (k k^T) beta_j, -1),
what was solved forward is (I + L) e = v - exp(b) k S, so the gradient of L is -de e^T with de the gradient of v, and
none of the inverse is needed. de is linear in the gradient G of the leaving state: de = local + carried @ G.
"""

import triton
import triton.language as tl

from ops.gated_delta_rule.triton_forward import matrix, rows


@triton.jit
def chunk_reads(
    q, k, sums, weights, inverses, do, chunks, carried, local, num_tokens, scale,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What de is made of: with P = scale * tril(D (q k^T)), local [T, HV, V] = (I + L)^-T (beta P^T do), and carried
    [T, HV, K] = (I + L)^-T (beta exp(total - b) k). Grid (M * HV).
    """
    m, h = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ik, ic = tl.arange(0, BK), tl.arange(0, C)
    inside = (start + ic) < end
    keys = inside[:, None] & (ik < K)[None]
    numbers = tl.cast(h, tl.int64) * num_tokens
    key = tl.load(rows(k, start, h // (HV // HK), HK, K, ic, ik), mask=keys, other=0.0)
    b = tl.load(sums + numbers + start + ic, mask=inside, other=0.0)
    weight = tl.load(weights + numbers + start + ic, mask=inside, other=0.0)
    total = tl.load(sums + numbers + end - 1)
    inverse = tl.load(rows(inverses, start, h, HV, C, ic, ic), mask=inside[:, None], other=0.0)
    scaled = (tl.trans(inverse) * (tl.exp(total - b) * weight)[None]).to(DOT)
    carry = tl.dot(scaled, key, input_precision=PRECISION)
    tl.store(rows(carried, start, h, HV, K, ic, ik), carry.to(DOT), mask=keys)
    later = (ic[:, None] <= ic[None]) & inside[None]
    decay = tl.exp(tl.where(later, b[None] - b[:, None], -float("inf"))) * (weight * scale)[:, None]
    for first in range(0, V, BV):
        iv = first + tl.arange(0, BV)
        values = inside[:, None] & (iv < V)[None]
        derror = tl.zeros((C, BV), tl.float32)
        for g in tl.static_range(H // HV):
            i = h * (H // HV) + g
            query = tl.load(rows(q, start, i // (H // HQ), HQ, K, ic, ik), mask=keys, other=0.0)
            dout = tl.load(rows(do, start, i, H, V, ic, iv), mask=values, other=0.0)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * decay
            derror += tl.dot(scores.to(DOT), dout, input_precision=PRECISION)
        derror = tl.dot(tl.trans(inverse), derror.to(DOT), input_precision=PRECISION)
        tl.store(rows(local, start, h, HV, V, ic, iv), derror.to(DOT), mask=values)


@triton.jit
def pass_gradients(
    q, k, sums, do, carried, local, bounds, edges, dfinal, grads, dinitial, num_tokens, scale,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GIVEN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's gradient from each document's end to its start: grads [M, HV, K, V] of the states that leave its
    chunks, and de in place of `local`. Grid (N * HV * V / BV).
    """
    PARTS: tl.constexpr = (V + BV - 1) // BV
    part, h, n = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % HV, tl.program_id(0) // PARTS // HV
    first, last, lo = tl.load(bounds + n), tl.load(bounds + n + 1), tl.load(edges + n)
    ik, iv, ic = tl.arange(0, BK), part * BV + tl.arange(0, BV), tl.arange(0, C)
    whole = (ik < K)[:, None] & (iv < V)[None]
    grad = tl.zeros((BK, BV), tl.float32)
    if GIVEN:
        grad = tl.load(matrix(dfinal, n, h, HV, K, V, ik, iv), mask=whole, other=0.0).to(tl.float32)
    numbers = tl.cast(h, tl.int64) * num_tokens
    num_chunks = tl.cdiv(last - first, C)
    for step in range(0, num_chunks):
        c = num_chunks - 1 - step
        start = first + c * C
        inside = (start + ic) < last
        rounded = grad.to(DOT)
        tl.store(matrix(grads, lo + c, h, HV, K, V, ik, iv), rounded, mask=whole)
        keys = inside[:, None] & (ik < K)[None]
        values = inside[:, None] & (iv < V)[None]
        carry = tl.load(rows(carried, start, h, HV, K, ic, ik), mask=keys, other=0.0)
        derror = tl.load(rows(local, start, h, HV, V, ic, iv), mask=values, other=0.0).to(tl.float32)
        key = tl.load(rows(k, start, h // (HV // HK), HK, K, ic, ik), mask=keys, other=0.0)
        total = tl.load(sums + numbers + tl.minimum(start + C, last) - 1)
        enter = tl.exp(tl.load(sums + numbers + start + ic, mask=inside, other=0.0))
        grad *= tl.exp(total)
        for g in tl.static_range(H // HV):
            i = h * (H // HV) + g
            query = tl.load(rows(q, start, i // (H // HQ), HQ, K, ic, ik), mask=keys, other=0.0)
            dout = tl.load(rows(do, start, i, H, V, ic, iv), mask=values, other=0.0)
            dout = (dout * (enter * scale)[:, None]).to(DOT)
            grad += tl.dot(tl.trans(query), dout, input_precision=PRECISION)
        derror += tl.dot(carry, rounded, input_precision=PRECISION)
        tl.store(rows(local, start, h, HV, V, ic, iv), derror.to(DOT), mask=values)
        recalled = (derror * -enter[:, None]).to(DOT)
        grad += tl.dot(tl.trans(key), recalled, input_precision=PRECISION)
    tl.store(matrix(dinitial, n, h, HV, K, V, ik, iv), grad, mask=whole)


@triton.jit
def gradients(
    q, k, sums, weights, do, errors, derrors, states, grads, chunks, dq, dk, dweights, dsums, dtotals, num_tokens,
    scale,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, and parts of the gradients of beta and log_decay. Grid (M * HK * K / BK): a key head, all that share it.

    First what passes through the state that a chunk leaves and through L, by value heads; then through outputs, by
    output heads. Parts, fp32, in slots of value heads followed by output heads: dweights [K / BK, HV + H, T] of beta's
    gradient, dsums likewise of the gradient of b_i, by which exp(b_i - b_j), exp(b_i) and exp(total - b_i) depend on
    the decays; dtotals [K / BK, HV, M] of the gradient of total. No decay lies between a token and itself.
    """
    PARTS: tl.constexpr = (K + BK - 1) // BK
    part, hk, m = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % HK, tl.program_id(0) // PARTS // HK
    num_chunks = tl.num_programs(0) // PARTS // HK
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ik, ic = part * BK + tl.arange(0, BK), tl.arange(0, C)
    inside = (start + ic) < end
    keys = inside[:, None] & (ik < K)[None]
    dkey = tl.zeros((C, BK), tl.float32)
    for h in range(hk * (HV // HK), (hk + 1) * (HV // HK)):
        number = tl.cast(h, tl.int64) * num_tokens + start
        total = tl.load(sums + number + end - start - 1)
        b = tl.load(sums + number + ic, mask=inside, other=0.0)
        weight = tl.load(weights + number + ic, mask=inside, other=0.0)
        through = tl.zeros((C, BK), tl.float32)
        kept = tl.zeros((BK,), tl.float32)
        for first in range(0, V, BV):
            iv = first + tl.arange(0, BV)
            whole = (ik < K)[:, None] & (iv < V)[None]
            values = inside[:, None] & (iv < V)[None]
            state = tl.load(matrix(states, m, h, HV, K, V, ik, iv), mask=whole, other=0.0)
            grad = tl.load(matrix(grads, m, h, HV, K, V, ik, iv), mask=whole, other=0.0)
            error = tl.load(rows(errors, start, h, HV, V, ic, iv), mask=values, other=0.0)
            through += tl.dot(error, tl.trans(grad), input_precision=PRECISION)
            kept += tl.sum(state.to(tl.float32) * grad.to(tl.float32), 1)
        key = tl.load(rows(k, start, hk, HK, K, ic, ik), mask=keys, other=0.0)
        dweight = tl.sum(through * key.to(tl.float32), 1) * tl.exp(total - b)
        dtotal = tl.sum(kept) * tl.exp(total) + tl.sum(dweight * weight)
        tl.store(dtotals + (part * HV + h) * num_chunks + m, dtotal)
        dkey += through * (tl.exp(total - b) * weight)[:, None]
        through = tl.zeros((C, BK), tl.float32)
        dlower = tl.zeros((C, C), tl.float32)
        for first in range(0, V, BV):
            iv = first + tl.arange(0, BV)
            whole = (ik < K)[:, None] & (iv < V)[None]
            values = inside[:, None] & (iv < V)[None]
            state = tl.load(matrix(states, m, h, HV, K, V, ik, iv), mask=whole, other=0.0)
            error = tl.load(rows(errors, start, h, HV, V, ic, iv), mask=values, other=0.0)
            derror = tl.load(rows(derrors, start, h, HV, V, ic, iv), mask=values, other=0.0)
            through += tl.dot(derror, tl.trans(state), input_precision=PRECISION)
            dlower += tl.dot(derror, tl.trans(error), input_precision=PRECISION)
        through *= -tl.exp(b)[:, None]
        db = tl.sum(through * key.to(tl.float32), 1)
        dkey += through
        products = tl.zeros((C, C), tl.float32)
        for first in range(0, K, BK):
            some = first + tl.arange(0, BK)
            mask = inside[:, None] & (some < K)[None]
            other = tl.load(rows(k, start, hk, HK, K, ic, some), mask=mask, other=0.0)
            products += tl.dot(other, tl.trans(other), input_precision=PRECISION)
        before = (ic[:, None] > ic[None]) & inside[:, None]
        dlower *= -tl.exp(tl.where(before, b[:, None] - b[None], -float("inf")))
        if part == 0:
            products *= dlower
            dweight += tl.sum(products, 0)
            db += tl.sum(products * weight[None], 1)
        db -= dweight * weight
        dlower *= weight[None]
        dkey += tl.dot((dlower + tl.trans(dlower)).to(DOT), key, input_precision=PRECISION)
        slot = tl.cast(part * (HV + H) + h, tl.int64) * num_tokens + start + ic
        tl.store(dweights + slot, dweight, mask=inside)
        tl.store(dsums + slot, db, mask=inside)
    for hq in range(hk * (HQ // HK), (hk + 1) * (HQ // HK)):
        dquery = tl.zeros((C, BK), tl.float32)
        for i in range(hq * (H // HQ), (hq + 1) * (H // HQ)):
            h = i // (H // HV)
            number = tl.cast(h, tl.int64) * num_tokens + start
            b = tl.load(sums + number + ic, mask=inside, other=0.0)
            weight = tl.load(weights + number + ic, mask=inside, other=0.0)
            through = tl.zeros((C, BK), tl.float32)
            dscores = tl.zeros((C, C), tl.float32)
            for first in range(0, V, BV):
                iv = first + tl.arange(0, BV)
                whole = (ik < K)[:, None] & (iv < V)[None]
                values = inside[:, None] & (iv < V)[None]
                state = tl.load(matrix(states, m, h, HV, K, V, ik, iv), mask=whole, other=0.0)
                error = tl.load(rows(errors, start, h, HV, V, ic, iv), mask=values, other=0.0)
                dout = tl.load(rows(do, start, i, H, V, ic, iv), mask=values, other=0.0)
                through += tl.dot(dout, tl.trans(state), input_precision=PRECISION)
                dscores += tl.dot(dout, tl.trans(error), input_precision=PRECISION)
            query = tl.load(rows(q, start, hq, HQ, K, ic, ik), mask=keys, other=0.0)
            through *= (tl.exp(b) * scale)[:, None]
            db = tl.sum(through * query.to(tl.float32), 1)
            dquery += through
            scores = tl.zeros((C, C), tl.float32)
            for first in range(0, K, BK):
                some = first + tl.arange(0, BK)
                mask = inside[:, None] & (some < K)[None]
                left = tl.load(rows(q, start, hq, HQ, K, ic, some), mask=mask, other=0.0)
                right = tl.load(rows(k, start, hk, HK, K, ic, some), mask=mask, other=0.0)
                scores += tl.dot(left, tl.trans(right), input_precision=PRECISION)
            causal = (ic[:, None] >= ic[None]) & inside[:, None]
            dscores *= tl.exp(tl.where(causal, b[:, None] - b[None], -float("inf"))) * scale
            dweight = tl.zeros((C,), tl.float32)
            if part == 0:
                scores *= dscores
                itself = tl.sum(tl.where(ic[:, None] == ic[None], scores, 0.0), 1)
                scores = tl.where(ic[:, None] > ic[None], scores, 0.0)
                columns = tl.sum(scores, 0)
                dweight += columns + itself
                db += tl.sum(scores * weight[None], 1) - columns * weight
            rounded = (dscores * weight[None]).to(DOT)
            key = tl.load(rows(k, start, hk, HK, K, ic, ik), mask=keys, other=0.0)
            dkey += tl.dot(tl.trans(rounded), query, input_precision=PRECISION)
            dquery += tl.dot(rounded, key, input_precision=PRECISION)
            slot = tl.cast(part * (HV + H) + HV + i, tl.int64) * num_tokens + start + ic
            tl.store(dweights + slot, dweight, mask=inside)
            tl.store(dsums + slot, db, mask=inside)
        tl.store(rows(dq, start, hq, HQ, K, ic, ik), dquery.to(dq.dtype.element_ty), mask=keys)
    tl.store(rows(dk, start, hk, HK, K, ic, ik), dkey.to(dk.dtype.element_ty), mask=keys)


@triton.jit
def decay_gradients(
    dweights, dsums, dtotals, chunks, dbeta, dlog, num_tokens,
    H: tl.constexpr, HV: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of beta and log_decay [T, HV] from the parts that `gradients` left. Grid (M * HV).

    Each log_decay gets the gradients of b of all later tokens of its chunk, and of total.
    """
    m, h = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ic = tl.arange(0, C)
    inside = (start + ic) < end
    place = tl.cast(start, tl.int64) * HV + h + ic * HV
    db, dweight = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    dtotal = 0.0
    for part in tl.static_range(PARTS):
        dtotal += tl.load(dtotals + (part * HV + h) * (tl.num_programs(0) // HV) + m)
        for slot in tl.static_range(1 + H // HV):
            head = h if slot == 0 else HV + h * (H // HV) + slot - 1
            number = tl.cast(part * (HV + H) + head, tl.int64) * num_tokens + start + ic
            db += tl.load(dsums + number, mask=inside, other=0.0)
            dweight += tl.load(dweights + number, mask=inside, other=0.0)
    tl.store(dbeta + place, dweight.to(dbeta.dtype.element_ty), mask=inside)
    later = dtotal + tl.sum(db) - tl.cumsum(db, 0)
    tl.store(dlog + place, (later + db).to(dlog.dtype.element_ty), mask=inside)
