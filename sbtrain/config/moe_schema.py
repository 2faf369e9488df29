"""How a stage runs its mixtures of experts: every key of `stages.NAME.experts`. None of them changes the model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Align(Enum):
    """How rows of an expert become a multiple of align_tokens: rows of zeros, or dropping what is too much."""

    pad = "pad"
    drop = "drop"


@dataclass(frozen=True)
class ExpertsConfig:
    """Load of the experts (SpikingBrain report, section 4.1). Only align=drop changes more than the order of sums.

    max_copies: hot experts of a layer whose weights every ep rank holds while they are hot, so that their tokens stay
        where they are; 0 copies none. Each takes the memory of an expert's weights and their fp32 gradient.
    copy_above: an expert becomes hot when its load in a step exceeds this times the even share.
    release_below: a hot expert is released when its load falls below this times the even share.
    recompute_above_tokens: a rank whose experts receive more rows than this in a micro-batch computes their FFN again
        in the backward pass instead of keeping it; 0 never does.
    align_tokens: the rows of every expert become a multiple of this; 1 leaves them.
    align: how.
    """

    max_copies: int = 0
    copy_above: float = 3.0
    release_below: float = 1.5
    recompute_above_tokens: int = 0
    align_tokens: int = 1
    align: Align = Align.pad


PLAIN = ExpertsConfig()
"""No feature is on."""
