"""Causal softmax attention with grouped queries, sliding window, packed documents and sinks.

Query t of a document sees keys max(start of document, t - window + 1) .. t, that is `window` keys with itself, and all
sink keys: one joint softmax. Fewer queries than keys are those of the last tokens. Source: Attention Is All You Need;
SpikingBrain report, sections 2.1 and 2.2 (sinks).

Tolerances against float64, relative norm of outputs and of every gradient: fp32 1e-5, bf16 1e-2.
"""

from __future__ import annotations

from typing import Optional, Union

from torch import Tensor

from ops import documents
from ops.registry import implementation

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Optional[int] = None,
    cu_seqlens: Optional[Tensor] = None,
    sink_k: Optional[Tensor] = None,
    sink_v: Optional[Tensor] = None,
    scale: Optional[float] = None,
    return_lse: bool = False,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """o [B, Q, Hq, V] in q's dtype; with return_lse also lse [B, Q, Hq] (fp32), the log of the softmax's denominator.

    q [B, Q, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, V] of one floating dtype, rotated already; Q <= T, query i is that
    of token T - Q + i, and cu_seqlens describes the T tokens (a document may end before the first query). scale
    defaults to 1/sqrt(D). sink_k [S, Hkv, D] and sink_v [S, Hkv, V] (after RoPE) are seen by every query of every
    document. Differentiable in q, k, v and the sinks, through both results; the gradients of keys that no query sees
    are 0. Raises ValueError on shapes that do not fit.
    """
    fits = k.shape[:3] == v.shape[:3] and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if not fits or q.shape[2] % k.shape[2]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must be [B, T, H, D], q's heads a multiple of k's; got {shapes}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"q must have no more tokens than k and v, being the last of theirs; got {q.shape[1]} for {k.shape[1]}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query itself), got {window}; None means no window")
    if (sink_k is None) != (sink_v is None):
        raise ValueError("sink_k and sink_v go together; give both or neither")
    if sink_k is not None and (sink_k.shape[1:] != k.shape[2:] or sink_v.shape != (len(sink_k), *v.shape[2:])):
        raise ValueError(f"sinks must be [S, Hkv, D], got {list(sink_k.shape)} and {list(sink_v.shape)}")
    documents.check(cu_seqlens, num_rows=k.shape[0], num_tokens=k.shape[1])
    run = implementation("attention", "attention", q)
    return run(
        q,
        k,
        v,
        window=window,
        cu_seqlens=cu_seqlens,
        sink_k=sink_k,
        sink_v=sink_v,
        scale=scale,
        return_lse=return_lse,
    )
