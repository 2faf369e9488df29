"""The spiking linear layer's Triton kernels in Triton's interpreter, with either backend's tiles.

Runs on ranks of run_ranks, which start with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from importlib import import_module


def sums(rank: int, backend: str, *, tokens: int, size: int, outputs: int, group: int, values: dict, dtype="float32"):
    """(worst relative error of a token, largest count, rows that are NaN): against exact sums of integers in int64.

    values: (token, channel) -> number, put into normal random x. mean_abs of token 2 is a hundredth of its mean.
    """
    import torch

    from ops.spike_count.reference import spike_count

    x = torch.randn(tokens, size)
    for (token, channel), value in values.items():
        x[token, channel] = value
    x = x.to(getattr(torch, dtype))
    mean = x.float().abs().mean(-1, keepdim=True)
    mean[min(2, tokens - 1)] /= 100
    weight = torch.randint(-128, 128, (outputs, size), dtype=torch.int8)
    scale, bias = torch.rand(outputs, size // group, 1) + 0.5, torch.randn(outputs).to(x.dtype)
    file = import_module(f"ops.spike_linear.{backend}")
    y = file.spike_linear(x, weight, bias, weight_scale=scale, mean_abs=mean).double()
    count, threshold = spike_count(x, mean_abs=mean)
    parts = [a.long() @ b.long().T for a, b in zip(count.split(group, 1), weight.split(group, 1))]
    total = sum(part * factor.T for part, factor in zip(parts, scale.double().unbind(1)))
    expected = total * threshold.double() + bias.double()
    broken = expected.isnan().any(1)
    assert torch.equal(y.isnan().all(1), broken) and torch.equal(y.isnan().any(1), broken)
    error = (y - expected)[~broken].norm(dim=1) / expected[~broken].norm(dim=1).clamp(min=1e-3)
    return float(error.max()), int(count.abs().max()), broken.nonzero().flatten().tolist()


def gradients(rank: int, backend: str) -> tuple[float, float, bool]:
    """Relative distances of the gradients of x and bias to those of a plain layer; whether the weight has none."""
    import torch

    x, bias = torch.randn(3, 7, 96).requires_grad_(), torch.randn(20).requires_grad_()
    weight, scale = torch.randint(-128, 128, (20, 96), dtype=torch.int8), torch.rand(20, 3, 1) + 0.5
    y = import_module(f"ops.spike_linear.{backend}").spike_linear(x, weight, bias, weight_scale=scale)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    plain = (weight.double().unflatten(1, (3, 32)) * scale).flatten(1)
    wanted = upstream.double() @ plain, upstream.double().sum((0, 1))
    found = [float((a.grad - b).norm() / b.norm()) for a, b in zip((x, bias), wanted)]
    return (*found, weight.grad is None)


def empty(rank: int, backend: str) -> list[list[int]]:
    """Shapes of y where x has no tokens, and where the layer has no outputs."""
    import torch

    call = import_module(f"ops.spike_linear.{backend}").spike_linear
    weight, scale = torch.ones(5, 64, dtype=torch.int8), torch.ones(5, 2, 1)
    return [
        list(call(torch.randn(2, 0, 64), weight, weight_scale=scale).shape),
        list(call(torch.randn(2, 3, 64), weight[:0], weight_scale=scale[:0]).shape),
    ]
