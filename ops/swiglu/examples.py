"""Example calls of ops.swiglu. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    shapes = {"small": [(2, 17, 2 * 48), (1, 2 * 7)], "mid": [(1, 1000, 2 * 4864)]}[size]
    return [("swiglu", (torch.randn(shape, dtype=torch.float64, requires_grad=True),), {}) for shape in shapes]
