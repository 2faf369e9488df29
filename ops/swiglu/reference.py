"""SwiGLU in plain torch."""

import torch
from torch.nn.functional import silu


def swiglu(gate_up):
    """See ops.swiglu."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)
