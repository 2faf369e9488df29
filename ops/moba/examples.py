"""Example calls of ops.moba. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    num_tokens, heads, channels = {"small": (65, (4, 2), 32), "mid": (500, (14, 2), 128)}[size]
    edges = torch.tensor((0, 0, 1, num_tokens // 3, num_tokens), dtype=torch.int32)
    sizes = {"chunk_tokens": num_tokens // 8, "num_chunks": 3}

    def tensors():
        return tuple(_randn(1, num_tokens, n, channels) for n in (heads[0], heads[1], heads[1]))

    return [("moba", tensors(), sizes), ("moba", tensors(), {**sizes, "cu_seqlens": edges})]


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
