"""Bodies of the RMSNorm kernels; tiles are the caller's."""

import triton
import triton.language as tl


@triton.jit
def forward(x, weight, y, rstd, num_rows, eps, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y and rstd [num_rows] of x [num_rows, SIZE], ROWS rows a program; BLOCK >= SIZE."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    at = rows[:, None] * SIZE + cols[None, :]
    mask = (rows[:, None] < num_rows) & (cols[None, :] < SIZE)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 1) / SIZE + eps)
    result = values * inverse[:, None] * scale[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + rows, inverse, mask=rows < num_rows)


@triton.jit
def backward(
    grad_y, x, weight, rstd, grad_x, grad_weight, num_rows, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_x, and one row of grad_weight [programs, SIZE] fp32: the sum over this program's rows."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    scale = tl.load(weight + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * SIZE + cols[None, :]
        mask = (rows[:, None] < num_rows) & (cols[None, :] < SIZE)
        upstream = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        normed = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        scaled = upstream * scale[None, :]
        mean = tl.sum(scaled * normed, 1) / SIZE
        result = (scaled - normed * mean[:, None]) * inverse[:, None]
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=mask)
        total += tl.sum(upstream * normed, 0)
    tl.store(grad_weight + program * SIZE + cols, total, mask=cols < SIZE)
