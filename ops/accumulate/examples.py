"""Example calls of ops.accumulate. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-6}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    shapes = {"small": [(3, 17), (4096,)], "mid": [(1000, 3, 513)]}[size]
    return [
        ("accumulate", (torch.randn(shape), torch.randn(shape, dtype=torch.float64)), {"add": add})
        for shape in shapes
        for add in (False, True)
    ]
