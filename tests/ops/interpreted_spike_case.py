"""The spike ops' Triton kernels in Triton's interpreter, on the CPU, against their references.

Runs on ranks of run_ranks, which start with TRITON_INTERPRET=1. The interpreter cuts numbers off where it makes bf16 of
them, so that bf16 is compared with tolerances.
"""

from __future__ import annotations

from importlib import import_module


def _functions(op: str, backend: str) -> list:
    return [import_module(f"ops.{op}.{name}") for name in (backend, "reference")]


def counted(rank: int, backend: str, shape: tuple, dtype: str, k: float, given: str | None) -> dict:
    """How many counts, values and gradients are not what they must be given the kernel's threshold, and the largest
    relative difference of a threshold. given: dtype of the mean that is handed over, which makes thresholds equal."""
    import torch

    kernels, reference = _functions("spike_count", backend)
    x = (torch.randn(*shape) * torch.randn(*shape).exp()).to(getattr(torch, dtype)).requires_grad_()
    options = {"k": k}
    if given:
        options["mean_abs"] = 1.25 * x.detach().float().abs().mean(-1, keepdim=True).to(getattr(torch, given))
    count, threshold = kernels.spike_count(x, **options)
    expected = reference.spike_count(x, **options)[1]
    exact = (x.detach().double() / threshold.double()).float().round()
    values = kernels.spike_values(x, **options)
    upstream = torch.randn(*shape).to(x.dtype)
    (gradient,) = torch.autograd.grad(values, x, upstream)
    return {
        "counts": int((count != exact).sum()),
        "values": int((values != (count * threshold).to(x.dtype)).sum()),
        "gradients": int((gradient != upstream).sum()),
        "threshold": float((threshold / expected - 1).abs().max()),
    }


def in_bf16(rank: int, backend: str) -> dict:
    """Where the mean is 1 in any dtype: how many counts differ, and the largest relative difference of a value."""
    from ops.spike_count.examples import _even

    kernels, reference = _functions("spike_count", backend)
    x = _even(33, 200).detach().bfloat16()
    pairs = [[*module.spike_count(x), module.spike_values(x).float()] for module in (kernels, reference)]
    (count, threshold, values), expected = pairs
    return {
        "counts": int((count != expected[0]).sum() + (threshold != expected[1]).sum()),
        "values": float((values - expected[2]).abs().div(expected[2].abs().clamp(min=1e-3)).max()),
    }


def odd_inputs(rank: int, backend: str) -> list[str]:
    """Inputs on which the kernel's results are not the reference's, NaN included."""
    import torch

    kernels, reference = _functions("spike_count", backend)
    base, one = torch.randn(5, 70), torch.ones(5, 1)
    bad = base.clone()
    bad[0, 3], bad[1, 69], bad[2, 0] = torch.nan, torch.inf, -torch.inf
    halves = torch.arange(-35, 35) * 0.5 + torch.zeros(5, 1)
    huge = torch.tensor([[1e38, -1e38, 1.0, 0.0], [8388607.0, 8388608.0, 8388609.0, 16777216.0]])
    cases = {
        "zeros": (torch.zeros(5, 70), None),
        "one sign": (base.abs(), base.abs().mean(-1, keepdim=True)),
        "not finite": (bad, None),
        "not finite, finite mean": (bad, one),
        "finite, mean not finite": (base, torch.tensor([[torch.nan], [torch.inf], [1.0], [0.0], [2.0]])),
        "halves": (halves, one),
        "tiny": (base * 1e-7, one * 1e-7),
        "huge": (huge, torch.tensor([[1e37], [1.0]])),
        "one element": (torch.tensor([[0.7]]), None),
        "no rows": (torch.zeros(0, 4), None),
        "no channels": (torch.zeros(3, 0), None),
        "not contiguous": (torch.randn(70, 5).T.abs(), one),
    }
    wrong = []
    for name, (x, mean) in cases.items():
        found, expected = (
            [*module.spike_count(x, k=1.0, mean_abs=mean), module.spike_values(x, k=1.0, mean_abs=mean)]
            for module in (kernels, reference)
        )
        if not all(torch.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True) for a, b in zip(found, expected)):
            wrong.append(name)
    return wrong


def coded(rank: int, backend: str) -> list[str]:
    """Codings, orders and shapes in which kernels and references differ, or counts do not come back."""
    import torch

    from ops.spike_encode.steps import COUNTED, ENCODINGS, SIGNED

    kernels, reference = _functions("spike_encode", backend)
    wrong = []
    for encoding in ENCODINGS:
        for lsb_first in (False, True):
            for shape, largest, more in (((3, 5, 9), 12, 6), ((1100,), 2**31 - 1, 0)):
                largest = min(largest, 30) if encoding in COUNTED else largest
                count = torch.randint(-largest if encoding in SIGNED else 0, largest + 1, shape)
                options = {"encoding": encoding, "lsb_first": lsb_first}
                steps = len(reference.spike_encode(count, **options)) + more
                options["num_steps"] = steps if more else None
                spikes, expected = (module.spike_encode(count, **options) for module in (kernels, reference))
                del options["num_steps"]
                back = kernels.spike_decode(spikes.to(torch.int8 if lsb_first else torch.bfloat16), **options)
                if not torch.equal(spikes, expected) or not torch.equal(back, count.int()):
                    wrong.append(f"{options} {shape}")
    return wrong


def refused(rank: int, backend: str) -> list[str]:
    """What decoding spikes of other codings says, and sums over int32."""
    import torch

    kernels, _ = _functions("spike_encode", backend)
    said = []
    strange = torch.zeros(3, 2000)
    strange[1, 1999] = 0.5
    for encoding, spikes in (
        ("binary", strange),
        ("ternary", 4 * strange),
        ("twos_complement", -2 * strange),
        ("bidirectional", strange / 0),
        ("ternary", torch.full((2, 3), 255, dtype=torch.uint8)),
        ("bidirectional", torch.full((2, 3), 255, dtype=torch.uint8)),
        ("bitwise", torch.ones(40, 3)),
        ("bitwise", torch.ones(64, 3)),
    ):
        try:
            kernels.spike_decode(spikes, encoding=encoding)
        except ValueError as error:
            said.append(str(error))
    return said
