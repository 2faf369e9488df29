"""Bodies of the RMSNorm kernels; tiles are the caller's. x is [num_rows, SIZE], BLOCK >= SIZE."""

import triton
import triton.language as tl


@triton.jit
def forward(
    x,
    residual,
    weight,
    y,
    total,
    rstd,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """y and rstd [num_rows] of x, or of total = x + residual, which is written too. ROWS rows a program."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    at = rows[:, None] * SIZE + cols[None, :]
    mask = (rows[:, None] < num_rows) & (cols[None, :] < SIZE)
    values = tl.load(x + at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        added = values.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        values = added.to(total.dtype.element_ty)
        tl.store(total + at, values, mask=mask)
    values = values.to(tl.float32)
    scale = tl.load(weight + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 1) / SIZE + eps)
    result = values * inverse[:, None] * scale[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + rows, inverse, mask=rows < num_rows)


@triton.jit
def backward(
    grad_y,
    grad_total,
    x,
    weight,
    rstd,
    grad_x,
    parts,
    num_rows,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_x, grad_total added to it, and one row of parts [programs, SIZE] fp32: this program's rows summed.

    Each program walks over tiles of ROWS rows; with STAGES > 1 the next tiles are on their way while it computes.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    scale = tl.load(weight + cols, mask=cols < SIZE, other=0.0)
    summed = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * SIZE + cols[None, :]
        mask = (rows[:, None] < num_rows) & (cols[None, :] < SIZE)
        upstream = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_TOTAL:
            passed = tl.load(grad_total + at, mask=mask, other=0.0)
        inverse = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)[:, None]
        normed *= inverse
        summed += tl.sum(upstream * normed, 0)
        scaled = upstream * scale.to(tl.float32)[None, :]
        result = (scaled - normed * (tl.sum(scaled * normed, 1) / SIZE)[:, None]) * inverse
        if HAS_TOTAL:
            result += passed.to(tl.float32)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(parts + program * SIZE + cols, summed, mask=cols < SIZE)


@triton.jit
def column_sums(parts, total, num_rows, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """total [SIZE] = sum of parts [num_rows, SIZE] fp32 over its rows, in one order. BLOCK columns a program."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    summed = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < num_rows) & (cols[None, :] < SIZE)
        summed += tl.load(parts + rows[:, None] * SIZE + cols[None, :], mask=mask, other=0.0)
    tl.store(total + cols, tl.sum(summed, 0).to(total.dtype.element_ty), mask=cols < SIZE)
