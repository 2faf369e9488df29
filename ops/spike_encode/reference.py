"""Spike encodings in plain torch."""

import torch

from ops.spike_encode.steps import (
    COUNTED,
    LARGEST_COUNT,
    LEAST_COUNT,
    NEGATIVE_SPIKES,
    check_bits,
    fitting_steps,
    raise_for,
)


def spike_encode(count, *, encoding, num_steps=None, lsb_first=False):
    """See ops.spike_encode."""
    count = count.to(torch.int64)
    num_steps = fitting_steps(encoding, *span(count), num_steps)
    by_step = (-1, *[1] * count.dim())
    if encoding in COUNTED:
        steps = torch.arange(num_steps, device=count.device).view(by_step)
        # no product of integers: it would take 8 bytes a spike, beside the result's 4
        return torch.where(steps < count.abs(), count.sign().float(), 0.0)
    places = _places(num_steps, lsb_first, count.device).view(by_step)
    if encoding == "twos_complement":
        return (count >> places & 1).float()
    return ((count.abs() >> places & 1) * count.sign()).float()


def spike_decode(spikes, *, encoding, lsb_first=False):
    """See ops.spike_encode."""
    strange = (spikes != 0) & (spikes != 1)
    if encoding in NEGATIVE_SPIKES and spikes.dtype.is_signed:  # -1 wraps to what unsigned dtypes hold: 255 of uint8
        strange &= spikes != -1
    raise_for(encoding, bool(strange.any()), False)
    spikes = spikes.to(torch.int64)
    if encoding not in COUNTED:
        check_bits(len(spikes))
        places = _places(len(spikes), lsb_first, spikes.device)
        weights = 1 << places
        if encoding == "twos_complement" and len(spikes):
            weights[places.argmax()] *= -1
        spikes = weights.view(-1, *[1] * (spikes.dim() - 1)) * spikes
    total = spikes.sum(0)
    raise_for(encoding, False, bool(((total < LEAST_COUNT) | (total > LARGEST_COUNT)).any()))
    return total.to(torch.int32)


def span(count):
    """(smallest, largest) of an integer tensor, in one transfer to the host; (0, 0) of an empty one."""
    return torch.stack(torch.aminmax(count)).tolist() if count.numel() else (0, 0)


def _places(num_steps, lsb_first, device):
    """The power of two of every step."""
    places = torch.arange(num_steps, device=device)
    return places if lsb_first else places.flip(0)
