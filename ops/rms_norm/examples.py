"""Example calls of ops.rms_norm. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    shapes = {"small": [(2, 17, 96), (5, 33)], "mid": [(1, 1000, 3584), (3000, 7, 128)]}[size]
    return [("rms_norm", (_randn(*shape), _randn(shape[-1])), {"eps": 1e-6}) for shape in shapes]


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
