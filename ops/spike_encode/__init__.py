"""Spike counts as trains of spikes over time steps, and back. Exact.

    coding           counts   spikes              steps without num_steps          5, and -5 where it is held
    binary           >= 0     0, 1                largest                          1,1,1,1,1
    ternary          any      -1, 0, 1            largest |count|                  -1,-1,-1,-1,-1
    bitwise          >= 0     0, 1                its bits, at least 1             1,0,1
    bidirectional    any      -1, 0, 1            bits of the largest |count|      -1,0,-1
    twos_complement  any      0, 1                one more than those, at least 2  1,0,1,1

binary and ternary fire once a unit and are then silent; more than 65,536 steps have to be asked for with num_steps.
Bits come most significant first, as in the released code, or least significant first, as in the report's equation 23.
Counts are those of int32.
Source: SpikingBrain report, section 3.3, and Int2Spike of the released W8ASpike model.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ops.registry import implementation
from ops.spike_encode.steps import ENCODINGS

__all__ = ["spike_decode", "spike_encode"]

NO_COUNTS = (torch.bool, torch.complex64, torch.complex128)


def spike_encode(count: Tensor, *, encoding: str, num_steps: Optional[int] = None, lsb_first: bool = False) -> Tensor:
    """Spikes fp32 [num_steps, *count.shape] in {-1, 0, 1} of an integer tensor.

    num_steps: see the table; more are silent, or repeat the sign of two's complement. lsb_first: order of the bits;
    binary and ternary have none. The smallest and the largest count cross to the host. Raises ValueError for negative
    counts in an unsigned coding, for too few steps, for more than 63 steps of bits, for counts that are no int32, and
    where binary or ternary would take more than 65,536 steps that num_steps does not ask for.
    """
    _check(encoding)
    if count.is_floating_point() or count.dtype in NO_COUNTS:
        raise ValueError(f"count must be integers, got {count.dtype}; round first, as ops.spike_count does")
    encode = implementation("spike_encode", "spike_encode", count)
    return encode(count, encoding=encoding, num_steps=num_steps, lsb_first=lsb_first)


def spike_decode(spikes: Tensor, *, encoding: str, lsb_first: bool = False) -> Tensor:
    """Counts int32 [...] of spikes [num_steps, ...] in any dtype.

    Whether all spikes are the coding's crosses to the host. Raises ValueError where they are not, for more than 63
    steps of bits, and for counts that int32 does not hold.
    """
    _check(encoding)
    if not spikes.dim():
        raise ValueError("spikes must be [num_steps, ...], got a single number")
    return implementation("spike_encode", "spike_decode", spikes)(spikes, encoding=encoding, lsb_first=lsb_first)


def _check(encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding={encoding}: no such encoding; choose from: {', '.join(ENCODINGS)}")
