"""Spike counts as trains of spikes over time steps, and back. Exact.

binary: count ones, then zeros. ternary: the same with the count's sign. bitwise: the bits of a count >= 0, most
significant first. bidirectional: the bits of |count| with its sign. twos_complement: the bits of count mod 2^steps.
Source: SpikingBrain report, section 3.3 and Int2Spike. Backends: reference only for now.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ops.registry import implementation

__all__ = ["spike_decode", "spike_encode"]

ENCODINGS = ("binary", "ternary", "bitwise", "bidirectional", "twos_complement")


def spike_encode(count: Tensor, *, encoding: str, num_steps: Optional[int] = None) -> Tensor:
    """Spikes fp32 [num_steps, *count.shape] in {-1, 0, 1} of an integer tensor.

    num_steps defaults to the fewest that hold the largest count. Raises ValueError for negative counts in an unsigned
    encoding, and for too few steps.
    """
    _check(encoding)
    return implementation("spike_encode", "spike_encode", count)(count, encoding=encoding, num_steps=num_steps)


def spike_decode(spikes: Tensor, *, encoding: str) -> Tensor:
    """Counts int32 [...] of spikes [num_steps, ...]."""
    _check(encoding)
    return implementation("spike_encode", "spike_decode", spikes)(spikes, encoding=encoding)


def _check(encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding={encoding}: no such encoding; choose from: {', '.join(ENCODINGS)}")
