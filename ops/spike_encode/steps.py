"""What a coding can hold: its spikes, how many steps it needs, and the errors where it does not fit."""

from __future__ import annotations

import operator
from typing import Optional

ENCODINGS = ("binary", "ternary", "bitwise", "bidirectional", "twos_complement")
SIGNED = ("ternary", "bidirectional", "twos_complement")
"""Codings of negative counts."""
COUNTED = ("binary", "ternary")
"""Codings of a spike for every unit; the others are made of bits."""
NEGATIVE_SPIKES = ("ternary", "bidirectional")
MOST_BITS = 63
MOST_UNITS = 2**16
"""Steps that a coding of units takes unasked: one huge count would otherwise take all memory."""
LEAST_COUNT, LARGEST_COUNT = -(2**31), 2**31 - 1


def fitting_steps(encoding: str, least: int, largest: int, num_steps: Optional[int]) -> int:
    """num_steps, or as many as the released code takes for counts from least to largest.

    Raises ValueError where the coding cannot hold them.
    """
    if least < LEAST_COUNT or largest > LARGEST_COUNT:
        raise ValueError(f"counts must fit into int32, got {least if least < LEAST_COUNT else largest}")
    if least < 0 and encoding not in SIGNED:
        raise ValueError(f"encoding={encoding} holds no negative counts, got {least}; use one of {', '.join(SIGNED)}")
    if num_steps is None:
        return _usual_steps(encoding, max(-least, largest))
    try:
        num_steps = operator.index(num_steps)  # numpy's integers as well
    except TypeError:
        raise ValueError(f"num_steps={num_steps!r} must be a whole number") from None
    needed, most = _fewest_steps(encoding, least, largest)
    if num_steps < needed:
        raise ValueError(f"num_steps={num_steps} cannot hold a count of {most} in {encoding}; use at least {needed}")
    if encoding not in COUNTED:
        check_bits(num_steps)
    return num_steps


def check_bits(num_steps: int) -> None:
    """Raise ValueError for more bits than a decoder adds up."""
    if num_steps > MOST_BITS:
        raise ValueError(f"num_steps={num_steps}: codings of bits have at most {MOST_BITS} steps")


def raise_for(encoding: str, strange: bool, too_large: bool) -> None:
    """Raise ValueError where a decoder met spikes that the coding does not have, or sums over int32."""
    if strange:
        known = "-1, 0 and 1" if encoding in NEGATIVE_SPIKES else "0 and 1"
        raise ValueError(f"spikes of encoding={encoding} must be {known}; there are others")
    if too_large:
        raise ValueError(f"spikes of encoding={encoding} stand for counts that int32 does not hold; use fewer steps")


def _usual_steps(encoding: str, size: int) -> int:
    if encoding in COUNTED:
        if size > MOST_UNITS:
            raise ValueError(
                f"encoding={encoding}: the largest |count|, {size}, takes as many steps, and more than {MOST_UNITS} "
                f"have to be asked for; use encoding='bitwise' or 'bidirectional', or give num_steps={size}"
            )
        return size
    bits = max(1, size.bit_length())
    return bits + 1 if encoding == "twos_complement" else bits


def _fewest_steps(encoding: str, least: int, largest: int) -> tuple[int, int]:
    """(steps that hold both, the one of them that needs so many)."""
    if encoding == "twos_complement":  # one step more for the sign; -2**n needs no more bits than 2**n - 1
        return max(((number if number >= 0 else ~number).bit_length() + 1, number) for number in (least, largest))
    size, most = max((abs(number), number) for number in (least, largest))
    return size if encoding in COUNTED else max(1, size.bit_length()), most
