"""Example calls of ops.rope and ops.rope_qk. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    num_tokens, num_heads, channels = {"small": (65, 3, 32), "mid": (1000, 28, 128)}[size]
    positions = torch.randint(0, 5000, (2, num_tokens))
    inv_freq = 1e6 ** (-torch.arange(channels // 2) / (channels // 2))
    q, k = (_randn(2, num_tokens, heads, channels) for heads in (num_heads, max(1, num_heads // 7)))
    return [("rope", (q, positions, inv_freq), {}), ("rope_qk", (q, k, positions, inv_freq), {})]


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
