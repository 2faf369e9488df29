"""Which source sample i of a stage comes from: a fixed periodic table, so any i is found without the ones before it.

Inside a period the sources are interleaved by Tijdeman's chairman assignment, which keeps every source within one
sample of its share after every prefix, for any number of sources (R. Tijdeman, "The chairman assignment problem",
Discrete Mathematics 32, 1980). Rounding shares by themselves, or drawing at random, does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

MAX_PERIOD = 65536
"""Weights whose common denominator is larger are rounded to multiples of 1/MAX_PERIOD."""


class Blend:
    """Weights over K sources, as a table of one period: 6 bytes a sample of the period, 400 kB at most."""

    def __init__(self, weights: Sequence[float]):
        """weights [K], not negative, one positive at least; only their ratios count. Raises ValueError otherwise."""
        self.counts = _counts(weights)
        """int64 [K]: samples of each source in one period."""
        self.period = int(self.counts.sum())
        self._source = _chairmen(self.counts)
        self._index = np.zeros(self.period, dtype=np.int32)
        for source, count in enumerate(self.counts):
            self._index[self._source == source] = np.arange(count)

    def assign(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers int64 [n] of the stage -> (source int64 [n], index within that source int64 [n])."""
        period, phase = np.divmod(samples, self.period)
        source = self._source[phase].astype(np.int64)
        return source, period * self.counts[source] + self._index[phase]


def _counts(weights: Sequence[float]) -> np.ndarray:
    """Samples of each source in the shortest period that has exactly these weights, or in MAX_PERIOD samples."""
    exact = [_decimal(weight) for weight in weights]
    if not exact or min(exact) < 0 or sum(exact) == 0:
        raise ValueError(f"data.sources weights {list(weights)} must be at least 0, and one of them above 0")
    scaled = [weight * math.lcm(*(w.denominator for w in exact)) for weight in exact]
    divisor = math.gcd(*(int(weight) for weight in scaled))
    counts = np.array([int(weight) // divisor for weight in scaled], dtype=object)
    if counts.sum() > MAX_PERIOD:
        counts = _rounded(exact)
    return counts.astype(np.int64)


def _decimal(weight: float) -> Fraction:
    """The number as it was written: 0.1 is a tenth."""
    try:
        return Fraction(repr(float(weight)))
    except ValueError as error:
        raise ValueError(f"data.sources weight {weight} must be a finite number") from error


def _rounded(weights: Sequence[Fraction]) -> np.ndarray:
    """MAX_PERIOD samples by largest remainder; a source that is wanted at all gets one at least."""
    total = sum(weights)
    shares = [weight * MAX_PERIOD / total for weight in weights]
    counts = np.array([max(int(share), int(share > 0)) for share in shares], dtype=np.int64)
    by_remainder = sorted(range(len(shares)), key=lambda k: (int(shares[k]) - shares[k], k))
    for k in by_remainder[: max(0, MAX_PERIOD - int(counts.sum()))]:
        counts[k] += 1
    return counts


def _chairmen(counts: np.ndarray) -> np.ndarray:
    """Source of each sample of one period, uint16 [period].

    At step n, of the sources far enough below their quota n*count/period, the one whose quota runs out first.
    """
    period, num_sources = int(counts.sum()), np.count_nonzero(counts)
    if num_sources == 1:
        return np.full(period, counts.argmax(), dtype=np.uint16)
    names = np.flatnonzero(counts)
    share = counts[names]
    # Tijdeman's slack 1/(2K - 2); everything is multiplied by it and by the period, to stay in integers.
    slack = 2 * num_sources - 2
    taken = np.zeros(num_sources, dtype=np.int64)
    chosen = np.empty(period, dtype=np.uint16)
    for step in range(1, period + 1):
        eligible = (step * share - taken * period) * slack >= period
        due = np.where(eligible, ((taken + 1) * slack - 1) / share, np.inf)
        k = due.argmin()
        taken[k] += 1
        chosen[step - 1] = names[k]
    return chosen
