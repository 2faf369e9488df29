"""Gated delta rule with grouped heads: a linear recurrence that first erases what the key already recalls.

Per value head, with state S [K, V] in fp32, starting from zero or from initial_state at each document:

    S <- exp(log_decay_t) S;   u = beta_t (v_t - k_t S);   S <- S + k_t^T u;   o_t = scale * q_t S

Queries may have more heads than keys and values (grouped queries: several read one state), or values more than queries
and keys (Gated DeltaNet: several states share a key and a query). Nothing is repeated in memory.

Source: Gated Delta Networks (Yang et al., 2024); SpikingBrain2.0's SSE layers. Tolerances against float64, relative
norm of outputs and of every gradient: fp32 1e-4, bf16 1e-2. log_decay must be finite and <= 0; -20 a token is safe.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ops import documents
from ops.registry import implementation

__all__ = ["gated_delta_rule"]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: Optional[float] = None,
    initial_state: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    output_final_state: bool = False,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Optional[Tensor]]:
    """(o [B, T, H, V] in q's dtype, final_state [N, Hv, K, V] fp32 or None), H = max(Hq, Hv).

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V]; log_decay (<= 0) and beta (0 .. 1) [B, T, Hv], best in fp32. Hq
    and Hv are multiples of Hk, and one of them of the other; output head i reads value head i // (H / Hv), query head
    i // (H / Hq), key head i // (H / Hk). N is the number of documents in cu_seqlens, or B without it. initial_state
    is [N, Hv, K, V]. scale defaults to 1/sqrt(K). qk_l2norm divides q and k by sqrt(|x|^2 + 1e-6) first; without it
    keys must have norm <= 1, or the recurrence grows. Everything is differentiable, states included. Raises ValueError
    on shapes that do not fit.
    """
    _check(q, k, v, log_decay, beta)
    documents.check(cu_seqlens, num_rows=k.shape[0], num_tokens=k.shape[1])
    if initial_state is not None:
        num_documents = k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        expected = (num_documents, v.shape[2], k.shape[3], v.shape[3])
        if initial_state.shape != expected:
            raise ValueError(f"initial_state must be {list(expected)}, got {list(initial_state.shape)}")
    run = implementation("gated_delta_rule", "gated_delta_rule", q)
    return run(
        q,
        k,
        v,
        log_decay,
        beta,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        qk_l2norm=qk_l2norm,
    )


def _check(q, k, v, log_decay, beta) -> None:
    if log_decay.shape != v.shape[:3] or beta.shape != v.shape[:3] or v.shape[:2] != k.shape[:2]:
        shapes = ", ".join(str(list(x.shape)) for x in (k, v, log_decay, beta))
        raise ValueError(f"k, v, log_decay, beta must be [B, T, Hk, K], [B, T, Hv, V], [B, T, Hv] twice; got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must be [B, T, Hq, K] like k {list(k.shape)}, got {list(q.shape)}")
    heads = (q.shape[2], k.shape[2], v.shape[2])
    if heads[0] % heads[1] or heads[2] % heads[1] or max(heads) % heads[0] or max(heads) % heads[2]:
        raise ValueError(
            f"q and v must have a multiple of k's heads, and one of the other's; got q, k, v heads {heads}"
        )
