"""Example calls of ops.spike_linear. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-3}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    num_rows, num_inputs, num_outputs = {"small": (9, 32, 20), "mid": (64, 64, 512)}[size]
    tensors = _randn(num_rows, num_inputs), _randn(num_outputs, num_inputs), _randn(num_outputs)
    scale = 0.01 + 0.01 * torch.rand(num_outputs, num_inputs // 16, 1)
    return [("spike_linear", tensors, {}), ("spike_linear", tensors[:2], {"weight_scale": scale})]


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
