"""Example calls of ops.gated_delta_rule. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    num_tokens, heads, channels = {"small": (65, (4, 2), 32), "mid": (1000, (16, 8), 128)}[size]
    edges = _cu(0, 0, 1, num_tokens // 3, num_tokens, num_tokens)

    def tensors(rows=1):
        decay, beta = (torch.rand(rows, num_tokens, heads[1]) for _ in range(2))
        decay, beta = (-0.2 * decay).requires_grad_(), beta.requires_grad_()
        return *(_randn(rows, num_tokens, n, channels) for n in (heads[0], heads[1], heads[1])), decay, beta

    states = torch.randn(5, heads[1], channels, channels, requires_grad=True)
    return [
        ("gated_delta_rule", tensors(2), {"qk_l2norm": True}),
        ("gated_delta_rule", tensors(), {"qk_l2norm": True, "cu_seqlens": edges}),
        (
            "gated_delta_rule",
            tensors(),
            {"qk_l2norm": True, "cu_seqlens": edges, "initial_state": states, "output_final_state": True},
        ),
    ]


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _cu(*edges):
    return torch.tensor(edges, dtype=torch.int32)
