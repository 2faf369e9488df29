"""Example calls of ops.spike_count. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-3}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    shape = {"small": (9, 33), "mid": (64, 64)}[size]
    x = torch.randn(shape, dtype=torch.float64)
    counts = [("spike_count", (x,), {"k": k}) for k in (1.0, 3.0)]
    return [*counts, ("spike_values", (x.clone().requires_grad_(),), {})]
