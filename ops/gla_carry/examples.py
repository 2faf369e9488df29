"""Example calls of ops.gla_carry. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    num_tokens, heads, channels = {"small": (130, (6, 2), 32), "mid": (3000, (14, 2), 128)}[size]

    def tensors(strength):
        o, q = (torch.randn(1, num_tokens, heads[0], channels, dtype=torch.float64) for _ in range(2))
        decay = -2 * strength * torch.rand(1, num_tokens, heads[1], channels)
        state = torch.randn(heads[1], channels, channels)
        return tuple(x.requires_grad_() for x in (o, q.relu(), decay, state))

    return [
        ("gla_carry", tensors(0.05), {}),
        ("gla_carry", tensors(0.0), {"scale": 0.5}),
        ("gla_carry", tensors(5.0), {"cu_seqlens": _cu(0, num_tokens // 2, num_tokens)}),
        ("gla_carry", tensors(0.05), {"cu_seqlens": _cu(0, num_tokens - 1, num_tokens - 1, num_tokens)}),
        ("gla_carry", tensors(0.05), {"cu_seqlens": _cu(0, 0, num_tokens)}),
    ]


def _cu(*edges):
    return torch.tensor(edges, dtype=torch.int32)
