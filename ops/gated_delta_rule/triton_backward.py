"""Kernels of the gated delta rule, backward: gradients of errors and states, then of everything else chunk by chunk.

Legend as in triton_forward. Of a chunk with entering state S, D_ij = exp(b_i - b_j) and L = tril(D (k k^T) beta_j, -1),
what was solved forward is (I + L) e = v - exp(b) k S, so the gradient of L is -de e^T with de the gradient of v, and
none of the inverse is needed. de is linear in the gradient G of the leaving state: de = local + carried @ G.
"""

import triton
import triton.language as tl

from ops.gated_delta_rule.triton_forward import block, chunk_rows, put_block, rows, transposed, within


@triton.jit
def chunk_reads(
    q, k, sums, weights, leaves, inverses, do, chunks, enters, carried, local, num_tokens, scale,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What de is made of: with P = scale * tril(D (q k^T)), local [M, HV, V, C] = ((I + L)^-T (beta P^T do))^T, and
    carried [M, HV, C, K] = (I + L)^-T (beta exp(total - b) k). Grid (M * HV). fp32 enters [M, HV, C] are exp(b), zero
    past a document's end.
    """
    m, h = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, end = tl.load(chunks + m * 2), tl.load(chunks + m * 2 + 1)
    ik, iv, ic = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    inside = (start + ic) < end
    number = tl.cast(h, tl.int64) * num_tokens + start + ic
    n = tl.program_id(0)
    key = chunk_rows(k, start, end, h // (HV // HK), 0, HK, K, ic, ik, False)
    b = tl.load(sums + number, mask=inside, other=0.0)
    weight = tl.load(weights + number, mask=inside, other=0.0)
    leave = tl.load(leaves + n * C + ic)
    inverse = block(inverses, n, 0, 0, ic, ic, C, C, False)
    causal = (ic[:, None] >= ic[None]) & inside[:, None]
    decay = tl.exp(tl.where(causal, b[:, None] - b[None], -float("inf"))) * (weight * scale)[None]
    for first in range(0, V, BV):
        derror = tl.zeros((BV, C), tl.float32)
        for g in tl.static_range(H // HV):
            i = h * (H // HV) + g
            query = chunk_rows(q, start, end, i // (H // HQ), 0, HQ, K, ic, ik, False)
            dout = chunk_rows(do, start, end, i, first, H, V, ic, iv, False)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * decay
            derror += tl.dot(tl.trans(dout), scores.to(DOT), input_precision=PRECISION)
        derror = tl.dot(derror.to(DOT), inverse, input_precision=PRECISION)
        put_block(local, n, first, iv, ic, derror.to(DOT), V, C, False)
    scaled = (tl.trans(inverse) * leave[None]).to(DOT)
    carry = tl.dot(scaled, key, input_precision=PRECISION)
    put_block(carried, n, 0, ic, ik, carry.to(DOT), C, K, False)
    tl.store(enters + n * C + ic, tl.where(inside, tl.exp(b), 0.0))


@triton.jit
def pass_gradients(
    q, k, totals, enters, do, carried, local, bounds, edges, dfinal, grads, dv, dinitial, scale,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GIVEN: tl.constexpr, BOXED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's gradient from each document's end to its start: grads [M, HV, V, K] of the states that leave its
    chunks, and de as dv [T, HV, V]. Grid (N * HV * V / BV). Transposed as in `pass_states`.
    """
    PARTS: tl.constexpr = (V + BV - 1) // BV
    part, h, n = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % HV, tl.program_id(0) // PARTS // HV
    first, last, lo = tl.load(bounds + n), tl.load(bounds + n + 1), tl.load(edges + n)
    ik, iv, ic = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    row = part * BV
    whole = (ik < K)[None] & (row + iv < V)[:, None]
    grad = tl.zeros((BV, BK), tl.float32)
    if GIVEN:
        grad = tl.load(transposed(dfinal, n, h, HV, K, V, ik, row + iv), mask=whole, other=0.0).to(tl.float32)
    num_chunks = tl.cdiv(last - first, C)
    upcoming = tl.load(totals + (lo + num_chunks - 1) * HV + h, mask=num_chunks > 0, other=0.0)
    for step in range(0, num_chunks):
        c = num_chunks - 1 - step
        number, start = (lo + c) * HV + h, first + c * C
        total = upcoming
        upcoming = tl.load(totals + number - HV, mask=c > 0, other=0.0)
        carry = block(carried, number, 0, 0, ic, ik, C, K, BOXED)
        derror = block(local, number, row, 0, iv, ic, V, C, BOXED).to(tl.float32)
        key = chunk_rows(k, start, last, h // (HV // HK), 0, HK, K, ic, ik, BOXED)
        enter = tl.load(enters + number * C + ic)
        rounded = grad.to(DOT)
        put_block(grads, number, row, iv, ik, rounded, V, K, BOXED)
        grad *= total
        for g in tl.static_range(H // HV):
            i = h * (H // HV) + g
            query = chunk_rows(q, start, last, i // (H // HQ), 0, HQ, K, ic, ik, BOXED)
            dout = tl.trans(chunk_rows(do, start, last, i, row, H, V, ic, iv, BOXED))
            grad += tl.dot((dout * (enter * scale)[None]).to(DOT), query, input_precision=PRECISION)
        derror += tl.dot(rounded, tl.trans(carry), input_precision=PRECISION)
        values = within(start + ic, row + iv, last, V)
        tl.store(rows(dv, start, h, HV, V, ic, row + iv), tl.trans(derror.to(DOT)), mask=values)
        grad += tl.dot((derror * -enter[None]).to(DOT), key, input_precision=PRECISION)
    tl.store(transposed(dinitial, n, h, HV, K, V, ik, row + iv), grad, mask=whole)


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
    ik, iv, ic = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    column = part * BK
    inside = (start + ic) < end
    keys = within(start + ic, column + ik, end, K)
    dkey = tl.zeros((C, BK), tl.float32)
    for h in range(hk * (HV // HK), (hk + 1) * (HV // HK)):
        number = tl.cast(h, tl.int64) * num_tokens + start
        total = tl.load(sums + number + end - start - 1)
        b = tl.load(sums + number + ic, mask=inside, other=0.0)
        weight = tl.load(weights + number + ic, mask=inside, other=0.0)
        through = tl.zeros((C, BK), tl.float32)
        kept = tl.zeros((BV,), tl.float32)
        for first in range(0, V, BV):
            state = block(states, m * HV + h, first, column, iv, ik, V, K, False)
            grad = block(grads, m * HV + h, first, column, iv, ik, V, K, False)
            error = block(errors, m * HV + h, first, 0, iv, ic, V, C, False)
            through += tl.dot(tl.trans(error), grad, input_precision=PRECISION)
            kept += tl.sum(state.to(tl.float32) * grad.to(tl.float32), 1)
        key = chunk_rows(k, start, end, hk, column, HK, K, ic, ik, False)
        dweight = tl.sum(through * key.to(tl.float32), 1) * tl.exp(total - b)
        dtotal = tl.sum(kept) * tl.exp(total) + tl.sum(dweight * weight)
        tl.store(dtotals + (part * HV + h) * num_chunks + m, dtotal)
        dkey += through * (tl.exp(total - b) * weight)[:, None]
        through = tl.zeros((C, BK), tl.float32)
        dlower = tl.zeros((C, C), tl.float32)
        for first in range(0, V, BV):
            state = block(states, m * HV + h, first, column, iv, ik, V, K, False)
            error = block(errors, m * HV + h, first, 0, iv, ic, V, C, False)
            derror = chunk_rows(derrors, start, end, h, first, HV, V, ic, iv, False)
            through += tl.dot(derror, state, input_precision=PRECISION)
            dlower += tl.dot(derror, error, input_precision=PRECISION)
        through *= -tl.exp(b)[:, None]
        db = tl.sum(through * key.to(tl.float32), 1)
        dkey += through
        products = tl.zeros((C, C), tl.float32)
        for first in range(0, K, BK):
            other = chunk_rows(k, start, end, hk, first, HK, K, ic, ik, False)
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
                state = block(states, m * HV + h, first, column, iv, ik, V, K, False)
                error = block(errors, m * HV + h, first, 0, iv, ic, V, C, False)
                dout = chunk_rows(do, start, end, i, first, H, V, ic, iv, False)
                through += tl.dot(dout, state, input_precision=PRECISION)
                dscores += tl.dot(dout, error, input_precision=PRECISION)
            query = chunk_rows(q, start, end, hq, column, HQ, K, ic, ik, False)
            through *= (tl.exp(b) * scale)[:, None]
            db = tl.sum(through * query.to(tl.float32), 1)
            dquery += through
            scores = tl.zeros((C, C), tl.float32)
            for first in range(0, K, BK):
                left = chunk_rows(q, start, end, hq, first, HQ, K, ic, ik, False)
                right = chunk_rows(k, start, end, hk, first, HK, K, ic, ik, False)
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
            key = chunk_rows(k, start, end, hk, column, HK, K, ic, ik, False)
            dkey += tl.dot(tl.trans(rounded), query, input_precision=PRECISION)
            dquery += tl.dot(rounded, key, input_precision=PRECISION)
            slot = tl.cast(part * (HV + H) + HV + i, tl.int64) * num_tokens + start + ic
            tl.store(dweights + slot, dweight, mask=inside)
            tl.store(dsums + slot, db, mask=inside)
        tl.store(rows(dq, start, hq, HQ, K, ic, column + ik), dquery.to(dq.dtype.element_ty), mask=keys)
    tl.store(rows(dk, start, hk, HK, K, ic, column + ik), dkey.to(dk.dtype.element_ty), mask=keys)


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
