"""Rotary position embedding in plain torch."""

import torch


def rope(x, positions, inv_freq):
    """See ops.rope."""
    exact = torch.promote_types(x.dtype, torch.float32)
    angles = (positions[..., None] * inv_freq.to(exact))[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    left, right = x.to(exact).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


def rope_qk(q, k, positions, inv_freq):
    """See ops.rope_qk."""
    return rope(q, positions, inv_freq), rope(k, positions, inv_freq)
