"""Example calls of ops.grouped_mm. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    sizes, num_inputs, num_outputs = {"small": ((9, 0, 24), 32, 48), "mid": ((100, 0, 256, 644), 256, 512)}[size]
    offsets = torch.tensor((0, *sizes)).cumsum(0).to(torch.int32)
    x, weight = _randn(sum(sizes), num_inputs), _randn(len(sizes), num_outputs, num_inputs)
    return [("grouped_mm", (x, weight), {"offsets": offsets})]


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
