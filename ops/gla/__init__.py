"""Gated linear attention with grouped queries, and its two halves for sequence-parallel shards.

Per key head, with state S [K, V] in fp32, starting from zero or from initial_state at each document:

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

Source: Gated Linear Attention Transformers (Yang et al., 2023), equation 3; SpikingBrain report, section 2.1. The query
heads of a group read one state, so there are Hkv states, not Hq.

Tolerances against float64, relative norm of outputs and of every gradient: fp32 1e-5, 5e-5 where the state decays by
more than exp(-5) a token; bf16 1e-2. log_decay must be finite and <= 0; -20 a token is safe.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ops import documents
from ops.registry import implementation

__all__ = ["gla", "gla_output", "gla_state"]


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: Optional[float] = None,
    initial_state: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Optional[Tensor]]:
    """(o [B, T, Hq, V] in q's dtype, final_state [N, Hkv, K, V] or None).

    q [B, T, Hq, K], k [B, T, Hkv, K], v [B, T, Hkv, V] of one floating dtype; log_decay [B, T, Hkv, K], best in fp32.
    States are fp32 (fp64 for fp64 inputs); N is the number of documents in cu_seqlens, or B without it. scale defaults
    to 1/sqrt(K). T = 1 with initial_state is the decoding step. Everything is differentiable, states included.
    Raises ValueError on shapes that do not fit.
    """
    _check(k, v, log_decay, cu_seqlens, q=q)
    if initial_state is not None:
        num_documents = k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        _check_state("initial_state", initial_state, (num_documents, k.shape[2], k.shape[3], v.shape[3]))
    run = implementation("gla", "gla", q)
    return run(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
    )


def gla_state(k: Tensor, v: Tensor, log_decay: Tensor, *, cu_seqlens: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """(state [Hkv, K, V], log_decay_total [Hkv, K]), both fp32: what a shard hands to the next one.

    k [1, T, Hkv, K], v [1, T, Hkv, V], log_decay [1, T, Hkv, K] are one shard of a row; cu_seqlens describes the shard.
    Document 0 is always the one that enters from the left (empty when another starts at the shard's first token), and
    the last document is the one that leaves (empty when the next shard begins a new one). state is made of the last
    document's tokens in this shard alone. log_decay_total is the sum of log_decay when the shard has one document, and
    -inf when a document starts in it (N > 1). The state after this shard is exp(log_decay_total) * state_in + state.
    """
    _check(k, v, log_decay, cu_seqlens, single=True)
    return implementation("gla", "gla_state", k)(k, v, log_decay, cu_seqlens=cu_seqlens)


def gla_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state_in: Tensor,
    *,
    scale: Optional[float] = None,
    cu_seqlens: Optional[Tensor] = None,
) -> Tensor:
    """o [1, T, Hq, V] of one shard, given the state [Hkv, K, V] (fp32) that enters its document 0; see gla_state.

    Equal to gla without the state and then ops.gla_carry, for which the state may arrive later.
    """
    _check(k, v, log_decay, cu_seqlens, q=q, single=True)
    _check_state("state_in", state_in, (k.shape[2], k.shape[3], v.shape[3]))
    return implementation("gla", "gla_output", q)(q, k, v, log_decay, state_in, scale=scale, cu_seqlens=cu_seqlens)


def _check(k, v, log_decay, cu_seqlens, *, q=None, single=False) -> None:
    num_rows, num_tokens, num_heads, _ = k.shape
    if log_decay.shape != k.shape:
        raise ValueError(f"log_decay must have k's shape {list(k.shape)}, got {list(log_decay.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [B, T, Hkv, V] like k {list(k.shape)}, got {list(v.shape)}")
    if single and num_rows != 1:
        raise ValueError(f"a shard is one row (B = 1), got B = {num_rows}; concatenate the rows and give cu_seqlens")
    if q is not None and (q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % num_heads):
        raise ValueError(f"q must be [B, T, Hq, K], Hq a multiple of k's heads {list(k.shape)}, got {list(q.shape)}")
    documents.check(cu_seqlens, num_rows=num_rows, num_tokens=num_tokens)


def _check_state(name: str, state: Tensor, shape: tuple) -> None:
    if state.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(state.shape)}")
