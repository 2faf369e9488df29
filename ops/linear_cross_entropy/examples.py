"""Example calls of ops.linear_cross_entropy. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    num_tokens, vocab, channels = {"small": (65, 300, 32), "mid": (1000, 49152, 256)}[size]
    labels = torch.randint(0, vocab - 10, (num_tokens,))
    labels[::7] = -100
    weights = torch.rand(num_tokens)

    def tensors():
        weight = torch.randn(vocab, channels, dtype=torch.float64) * channels**-0.5
        return _randn(num_tokens, channels), weight.requires_grad_(), labels

    return [
        ("linear_cross_entropy", tensors(), {}),
        ("linear_cross_entropy", tensors(), {"loss_weights": weights, "valid_vocab": vocab - 10}),
    ]


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
