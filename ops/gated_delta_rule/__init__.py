"""Gated delta rule with grouped queries: a linear recurrence that first erases what the key already recalls.

Per key head, with state S [K, V] in fp32, starting from zero or from initial_state at each document:

    S <- exp(log_decay_t) S;   u = beta_t (v_t - k_t S);   S <- S + k_t^T u;   o_t = scale * q_t S

Source: Gated Delta Networks (Yang et al., 2024); SpikingBrain2.0's SSE layers. Tolerances against float64, relative
norm of outputs and of every gradient: fp32 1e-4, bf16 1e-2. Backends: reference only for now.
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
    """(o [B, T, Hq, V] in q's dtype, final_state [N, Hkv, K, V] fp32 or None).

    q [B, T, Hq, K], k [B, T, Hkv, K], v [B, T, Hkv, V]; log_decay (<= 0) and beta (0 .. 1) [B, T, Hkv], best in fp32.
    N is the number of documents in cu_seqlens, or B without it. scale defaults to 1/sqrt(K). qk_l2norm divides q and k
    by sqrt(|x|^2 + 1e-6) first; without it keys must have norm <= 1, or the recurrence grows. Everything is
    differentiable, states included. Raises ValueError on shapes that do not fit.
    """
    if log_decay.shape != k.shape[:3] or beta.shape != k.shape[:3] or v.shape[:3] != k.shape[:3]:
        shapes = ", ".join(str(list(x.shape)) for x in (k, v, log_decay, beta))
        raise ValueError(f"k, v, log_decay, beta must be [B, T, H, K], [B, T, H, V], [B, T, H] twice; got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must be [B, T, Hq, K], Hq a multiple of k's heads {list(k.shape)}, got {list(q.shape)}")
    documents.check(cu_seqlens, num_rows=k.shape[0], num_tokens=k.shape[1])
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
