"""Bodies of the SwiGLU kernels; tiles are the caller's. Row r of gate_up [rows, 2 SIZE] is program_id(0)."""

import triton
import triton.language as tl


@triton.jit
def forward(gate_up, y, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """y [rows, SIZE] = silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < SIZE
    at = gate_up + row * 2 * SIZE + cols
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + SIZE, mask=mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(y + row * SIZE + cols, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward(grad_y, gate_up, grad, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """grad [rows, 2 SIZE] of gate_up."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < SIZE
    at = row * 2 * SIZE + cols
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + SIZE, mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(grad_y + row * SIZE + cols, mask=mask, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    to_gate = upstream * up * open_ * (1.0 + gate * (1.0 - open_))
    to_up = upstream * gate * open_
    tl.store(grad + at, to_gate.to(grad.dtype.element_ty), mask=mask)
    tl.store(grad + at + SIZE, to_up.to(grad.dtype.element_ty), mask=mask)
