"""SwiGLU's elementwise part: silu(gate) * up, fp32 inside, rounded once.

Source: GLU Variants Improve Transformer (Shazeer, 2020). Tolerances against float64, relative norm of output and
gradient: fp32 1e-5, bf16 1e-2.
"""

from __future__ import annotations

from torch import Tensor

from ops.registry import implementation

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F], the gate in the first half of the last dimension and up in the second -> [..., F], same dtype.

    Raises ValueError when the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up's last dimension must hold two halves, got {gate_up.shape[-1]}")
    return implementation("swiglu", "swiglu", gate_up)(gate_up)
