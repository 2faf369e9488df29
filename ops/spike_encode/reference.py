"""Spike encodings in plain torch."""

import torch

SIGNED = ("ternary", "bidirectional", "twos_complement")
COUNTED = ("binary", "ternary")


def spike_encode(count, *, encoding, num_steps=None):
    """See ops.spike_encode."""
    count = count.to(torch.int64)
    largest = int(count.abs().max()) if count.numel() else 0
    if encoding not in SIGNED and count.numel() and int(count.min()) < 0:
        raise ValueError(f"encoding={encoding} holds no negative counts, got {int(count.min())}; use one of {SIGNED}")
    needed = _steps(encoding, largest)
    num_steps = needed if num_steps is None else num_steps
    if num_steps < needed:
        raise ValueError(f"num_steps={num_steps} cannot hold a count of {largest} in {encoding}; use at least {needed}")
    steps = torch.arange(num_steps, device=count.device).view(-1, *[1] * count.dim())
    if encoding in COUNTED:
        return ((steps < count.abs()) * count.sign()).float()
    if encoding == "twos_complement":
        return (count % (1 << num_steps) >> (num_steps - 1 - steps) & 1).float()
    return ((count.abs() >> (num_steps - 1 - steps) & 1) * count.sign()).float()


def spike_decode(spikes, *, encoding):
    """See ops.spike_encode."""
    spikes = spikes.to(torch.int64)
    if encoding in COUNTED:
        return spikes.sum(0).to(torch.int32)
    num_steps = len(spikes)
    weights = 1 << torch.arange(num_steps - 1, -1, -1, device=spikes.device)
    if encoding == "twos_complement":
        weights[0] = -weights[0]
    return (weights.view(-1, *[1] * (spikes.dim() - 1)) * spikes).sum(0).to(torch.int32)


def _steps(encoding, largest):
    if encoding in COUNTED:
        return largest
    bits = max(1, largest.bit_length())
    return max(2, bits + 1) if encoding == "twos_complement" else bits
