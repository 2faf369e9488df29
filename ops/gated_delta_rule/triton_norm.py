"""Kernels that divide rows by their norm, and its gradient. Rows [N, K] of all tokens and heads."""

import triton
import triton.language as tl

EPS: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def unit_rows(x, y, num_rows, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):
    """y = x / sqrt(|x|^2 + EPS). Grid (N / ROWS)."""
    ik, row = tl.arange(0, BK), tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < num_rows)[:, None] & (ik < K)[None]
    place = row[:, None] * K + ik[None]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) + EPS)[:, None]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def unit_row_gradients(x, dy, dx, num_rows, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):
    """dx of unit_rows. Grid (N / ROWS)."""
    ik, row = tl.arange(0, BK), tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < num_rows)[:, None] & (ik < K)[None]
    place = row[:, None] * K + ik[None]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
    shrink = tl.rsqrt(tl.sum(value * value, 1) + EPS)[:, None]
    value *= shrink
    grad -= value * tl.sum(value * grad, 1)[:, None]
    tl.store(dx + place, (grad * shrink).to(dx.dtype.element_ty), mask=mask)
