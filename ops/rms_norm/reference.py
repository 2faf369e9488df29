"""RMSNorm in plain torch."""

import torch
from torch.nn.functional import rms_norm as torch_rms_norm


def rms_norm(x, weight, *, eps):
    """See ops.rms_norm."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return torch_rms_norm(x.to(exact), weight.shape, weight.to(exact), eps).to(x.dtype)
