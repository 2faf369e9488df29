"""Example calls of ops.gla. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    num_tokens, heads, channels = {"small": (65, (6, 2), 32), "mid": (1000, (14, 2), 128)}[size]
    edges = _cu(0, 0, 1, num_tokens // 3, num_tokens, num_tokens)

    def tensors(strength, rows=1):
        q, k = (_randn(rows, num_tokens, n, channels).detach().relu().requires_grad_() for n in heads)
        decay = -2 * strength * torch.rand(rows, num_tokens, heads[1], channels)
        return q, k, _randn(rows, num_tokens, heads[1], channels), decay.requires_grad_()

    def states(num_documents):
        return torch.randn(num_documents, heads[1], channels, channels, requires_grad=True)

    shard = tensors(0.1)
    return [
        ("gla", tensors(0.05, rows=2), {}),
        ("gla", tensors(5.0), {"cu_seqlens": edges}),
        ("gla", tensors(0.05), {"cu_seqlens": edges, "initial_state": states(5), "output_final_state": True}),
        ("gla_state", shard[1:], {}),
        ("gla_output", (*shard, states(1)[0].detach().requires_grad_()), {"cu_seqlens": edges}),
    ]


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _cu(*edges):
    return torch.tensor(edges, dtype=torch.int32)
