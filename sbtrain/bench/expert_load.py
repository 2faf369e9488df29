"""Loads of experts that a benchmark can force."""

from __future__ import annotations

from enum import Enum


class ExpertLoad(Enum):
    """natural: as the router deals; balanced: evenly; skewed: one expert gets a large share."""

    natural = "natural"
    balanced = "balanced"
    skewed = "skewed"


def forced_shares(load: ExpertLoad, num_experts: int, *, hot_share: float) -> list[float] | None:
    """The share of each expert, 1 in all, or None for the router's own. hot_share: of the first one if skewed."""
    if load is ExpertLoad.natural:
        return None
    if load is ExpertLoad.balanced or num_experts == 1:
        return [1.0 / num_experts] * num_experts
    return [hot_share] + [(1.0 - hot_share) / (num_experts - 1)] * (num_experts - 1)
