"""Example calls of ops.spike_encode. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

from ops.spike_encode.steps import ENCODINGS, NEGATIVE_SPIKES, SIGNED

TOLERANCES = {torch.float32: 0.0}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid"."""
    shape = {"small": (9, 33), "mid": (256, 512)}[size]
    calls = []
    for name in ENCODINGS:
        count = torch.randint(-12 if name in SIGNED else 0, 13, shape)
        spikes = torch.randint(-1 if name in NEGATIVE_SPIKES else 0, 2, (4, *shape)).double()
        for lsb_first, options in ((False, {"num_steps": 14}), (True, {})):
            order = {"encoding": name, "lsb_first": lsb_first}
            calls += [("spike_encode", (count,), {**order, **options}), ("spike_decode", (spikes,), order)]
    return calls
