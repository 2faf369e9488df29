"""Mixture of block attention: each query attends to its own chunk, causally, and to the past chunks it likes best.

A past chunk's score for a query is q . mean(keys of the chunk), unscaled, in fp32; the best num_chunks - 1 are attended
in full. The choice is per query head, and no gradient flows through it. Chunks are counted from the document's start.
Source: MoBA (Lu et al., 2025); SpikingBrain2.0. Tolerances against float64 with the same choice, relative norm of
output and gradients: fp32 1e-5, bf16 1e-2. Backends: reference only for now.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ops import documents
from ops.registry import implementation

__all__ = ["moba"]


def moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_tokens: int,
    num_chunks: int,
    cu_seqlens: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """o [B, T, Hq, V] in q's dtype.

    q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, V]. num_chunks counts the attended chunks, the own one included.
    scale defaults to 1/sqrt(D). Raises ValueError on shapes that do not fit.
    """
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must be [B, T, H, D], q's heads a multiple of k's; got {shapes}")
    if chunk_tokens < 1 or num_chunks < 1:
        raise ValueError(f"chunk_tokens and num_chunks must be at least 1, got {chunk_tokens} and {num_chunks}")
    documents.check(cu_seqlens, num_rows=q.shape[0], num_tokens=q.shape[1])
    run = implementation("moba", "moba", q)
    return run(q, k, v, chunk_tokens=chunk_tokens, num_chunks=num_chunks, cu_seqlens=cu_seqlens, scale=scale)
