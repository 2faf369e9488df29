"""Example calls of ops.spike_encode. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 0.0}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    counts = torch.randint(0, 12, {"small": (9, 33), "mid": (256, 512)}[size])
    signed = counts - 6
    spikes = torch.randint(0, 2, (4, *counts.shape)).double()
    calls = [("spike_encode", (counts,), {"encoding": name}) for name in ("binary", "bitwise")]
    names = ("ternary", "bidirectional", "twos_complement")
    calls += [("spike_encode", (signed,), {"encoding": name}) for name in names]
    return [*calls, ("spike_decode", (spikes,), {"encoding": "twos_complement"})]
