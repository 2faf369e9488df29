"""The pointwise ops' and the cross-entropy's Triton kernels in Triton's interpreter, with either backend's tiles.

Runs on ranks of run_ranks, which start with TRITON_INTERPRET=1. The interpreter rounds between multiply and add.
"""

from __future__ import annotations

from importlib import import_module


def differences(rank: int, op: str, backend: str, case: dict, dtype: str = "float32") -> list[float]:
    """Relative distance of op's file for backend to its float64 reference: outputs, then gradients of the inputs."""
    import torch

    call, inputs = globals()[f"_{op}"](torch, **case)
    results = []
    rounded = [x.to(getattr(torch, dtype)) for x in inputs]
    for name, leaves in ((backend, rounded), ("reference", [x.double() for x in rounded])):
        leaves = [x.detach().requires_grad_() for x in leaves]
        outputs = call(import_module(f"ops.{op}.{name}"), *leaves)
        generator = torch.Generator().manual_seed(7)
        loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-3)) for a, b in zip(*results)]


def _randn(torch, *shape):
    return torch.randn(*shape, dtype=torch.float64)


def _rms_norm(torch, *, shape, residual=False):
    inputs = [_randn(torch, *shape), _randn(torch, shape[-1])]
    if not residual:
        return lambda module, *x: [module.rms_norm(*x, eps=1e-5)], inputs
    return (
        lambda module, x, weight, added: module.rms_norm(x, weight, eps=1e-5, residual=added),
        [*inputs, _randn(torch, *shape)],
    )


def _swiglu(torch, *, shape):
    return lambda module, x: [module.swiglu(x)], [_randn(torch, *shape)]


def _rope(torch, *, shape, part=slice(None), keys=None):
    """A part of x, or two: queries and keys that lie in it."""
    positions = torch.randint(0, 100, shape[:2])
    inv_freq = 1e4 ** (-torch.arange(shape[3] // 2) * 2 / shape[3])
    if keys is None:
        return lambda module, x: [module.rope(x[:, :, part], positions, inv_freq)], [_randn(torch, *shape)]
    return (
        lambda module, x: module.rope_qk(x[:, :, part], x[:, :, keys], positions, inv_freq),
        [_randn(torch, *shape)],
    )


def _grouped_mm(torch, *, edges, sizes):
    offsets = torch.tensor(edges, dtype=torch.int32)
    inputs = [_randn(torch, edges[-1], sizes[0]), _randn(torch, len(edges) - 1, sizes[1], sizes[0])]
    return lambda module, *x: [module.grouped_mm(*x, offsets=offsets)], inputs


def _linear_cross_entropy(torch, *, num_tokens, vocab, valid_vocab=None, chunk_tokens=256, per_token=True):
    from ops.linear_cross_entropy import launch

    launch.Kernels.chunk_tokens = lambda self, weight: chunk_tokens
    labels = torch.randint(0, valid_vocab or vocab, (num_tokens,))
    labels[::5] = -100
    weights = torch.rand(num_tokens)

    def call(module, hidden, weight):
        loss = module.linear_cross_entropy(hidden, weight, labels, valid_vocab=valid_vocab, loss_weights=weights)
        return [loss if per_token else loss.sum()]

    return call, [_randn(torch, num_tokens, 8), _randn(torch, vocab, 8)]


def accumulated(rank: int, backend: str, size: int, dtype: str) -> bool:
    """Whether a part of size elements is written and then added exactly, and a transposed one too."""
    import torch

    file = import_module(f"ops.accumulate.{backend}")
    first, second = (torch.randn(size).to(getattr(torch, dtype)) for _ in range(2))
    total = torch.full((size,), float("nan"))
    file.accumulate(total, first, add=False)
    equal = torch.equal(total, first.float())
    file.accumulate(total, second, add=True)
    equal &= torch.equal(total, first.float() + second.float())
    square = torch.zeros(2, size)
    file.accumulate(square, torch.stack([first, second], 1).T, add=True)
    return equal and torch.equal(square, torch.stack([first, second]).float())


def buffered(rank: int, backend: str) -> list[float]:
    """The gradient that two micro-batches put into a buffer, against autograd's on the reference."""
    import torch

    from ops.linear_cross_entropy import reference

    class Buffer:
        total, scale, calls = torch.full((600, 8), torch.nan), 0.25, 0

        def begin(self):
            self.calls += 1
            return self.calls > 1

        def finish(self):
            self.calls += 10

    module, buffer = import_module(f"ops.linear_cross_entropy.{backend}"), Buffer()
    hidden, weight, labels = torch.randn(2, 9, 8), torch.randn(600, 8), torch.randint(0, 600, (2, 9))
    expected = torch.zeros(600, 8, dtype=torch.float64)
    for x, wanted in zip(hidden, labels):
        loss = module.linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), wanted, weight_grad=buffer)
        (loss.sum() * 0.25).backward()
        exact = weight.detach().double().requires_grad_()
        (reference.linear_cross_entropy(x.detach().double(), exact, wanted).sum() * 0.25).backward()
        expected += exact.grad
    assert weight.grad is None and buffer.calls == 22
    return [float((buffer.total - expected).norm() / expected.norm())]
