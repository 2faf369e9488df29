"""RMSNorm in plain torch."""

import torch
from torch.nn.functional import rms_norm as torch_rms_norm


def rms_norm(x, weight, *, eps, residual=None):
    """See ops.rms_norm."""
    if residual is not None:
        total = x + residual
        return rms_norm(total, weight, eps=eps), total
    exact = torch.promote_types(x.dtype, torch.float32)
    return torch_rms_norm(x.to(exact), weight.shape, weight.to(exact), eps).to(x.dtype)
