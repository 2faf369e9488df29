"""Kernel of gated linear attention for a few tokens at a time: decoding. Legend as in triton_forward."""

import triton
import triton.language as tl


@triton.jit
def steps(
    q, k, v, log_decay, given, o, ends, scale,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PV: tl.constexpr, PARTS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """o [B, T, H * G, V] and the state behind the tokens, ends [B, H, K, V]; one token after the other in fp32.

    given [B, H, K, V]: initial states. Grid (B * PARTS, H).
    """
    row, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    ik, iv = tl.arange(0, BK), part * PV + tl.arange(0, PV)
    place = (row * H + h).to(tl.int64) * (K * V) + ik[:, None] * V + iv[None]
    whole = (ik < K)[:, None] & (iv < V)[None]
    state = tl.zeros((BK, PV), tl.float32)
    if GIVEN:
        state = tl.load(given + place, mask=whole, other=0.0)
    for t in range(T):
        token = (row * T + t).to(tl.int64) * H + h
        decay = tl.load(log_decay + token * K + ik, mask=ik < K, other=0.0).to(tl.float32)
        key = tl.load(k + token * K + ik, mask=ik < K, other=0.0).to(tl.float32)
        value = tl.load(v + token * V + iv, mask=iv < V, other=0.0).to(tl.float32)
        state = state * tl.exp(decay)[:, None] + key[:, None] * value[None]
        for head in range(G):
            query = tl.load(q + (token * G + head) * K + ik, mask=ik < K, other=0.0).to(tl.float32) * scale
            out = tl.sum(query[:, None] * state, 0)
            tl.store(o + (token * G + head) * V + iv, out.to(o.dtype.element_ty), mask=iv < V)
    tl.store(ends + place, state, mask=whole)
