"""Example calls of ops.attention. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    num_tokens, heads, channels = {"small": (65, (6, 2), 32), "mid": (1000, (14, 2), 128)}[size]
    edges = _cu(0, 0, 1, num_tokens // 3, num_tokens, num_tokens)

    def tensors(rows=1, num_queries=num_tokens):
        keys = (_randn(rows, num_tokens, heads[1], channels) for _ in "kv")
        return _randn(rows, num_queries, heads[0], channels), *keys

    sinks = {"sink_k": _randn(5, heads[1], channels), "sink_v": _randn(5, heads[1], channels)}
    return [
        ("attention", tensors(2), {}),
        ("attention", tensors(), {"window": num_tokens // 4}),
        ("attention", tensors(), {"window": num_tokens // 4, "cu_seqlens": edges}),
        ("attention", tensors(), {"window": num_tokens // 4, "cu_seqlens": edges, **sinks}),
        ("attention", tensors(), {"cu_seqlens": edges, "return_lse": True}),
        ("attention", tensors(2, num_tokens // 2), {}),
        ("attention", tensors(1, num_tokens // 2), {"window": num_tokens // 4, "cu_seqlens": edges}),
    ]


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _cu(*edges):
    return torch.tensor(edges, dtype=torch.int32)
