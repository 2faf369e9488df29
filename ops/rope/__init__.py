"""Rotary position embedding, NeoX layout: channel i turns with channel i + D/2 by position * inv_freq[i].

Angles, cosines and sines are fp32, the result is rounded once. Source: RoFormer (Su et al., 2021), half-split layout of
GPT-NeoX. Tolerances against float64, relative norm of output and gradient: fp32 1e-5 (at positions below 1e4; an fp32
angle of 1e5 is good to 4e-3), bf16 1e-2.
"""

from __future__ import annotations

from torch import Tensor

from ops.registry import implementation

__all__ = ["rope", "rope_qk"]


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """x [B, T, H, D], positions int64 [B, T] (inside the document), inv_freq fp32 [D/2] -> [B, T, H, D], x's dtype.

    Differentiable in x. Raises ValueError on shapes that do not fit.
    """
    _check("x", x, positions, inv_freq)
    return implementation("rope", "rope", x)(x, positions, inv_freq)


def rope_qk(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """(rope(q), rope(k)) in one pass, forward and backward.

    q [B, T, Hq, D] and k [B, T, Hkv, D] of one dtype, which may be views of one projection; positions and inv_freq as
    for `rope`. Differentiable in q and k. Raises ValueError on shapes that do not fit and on two dtypes.
    """
    _check("q", q, positions, inv_freq)
    _check("k", k, positions, inv_freq)
    if k.dtype != q.dtype:
        raise ValueError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}; convert one")
    return implementation("rope", "rope_qk", q)(q, k, positions, inv_freq)


def _check(name: str, x: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
    if positions.shape != x.shape[:2] or inv_freq.shape != (x.shape[3] // 2,) or x.shape[3] % 2:
        shapes = ", ".join(str(list(y.shape)) for y in (x, positions, inv_freq))
        raise ValueError(f"{name}, positions, inv_freq must be [B, T, H, D], [B, T], [D/2] with D even; got {shapes}")
