"""Choosing the next token: greedy, or drawn from the top of the distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy, and then the rest has no effect.

    top_k: draw from the k most likely tokens; 0 from all. top_p: from the fewest tokens whose probabilities, after
    temperature and top_k, reach p. seed: equal seeds draw equal tokens, on every device.
    Raises ValueError naming the key.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (no limit) or a positive number of tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


class Sampler:
    """The draws of one text."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        # Drawn on the CPU: a GPU's generator would give other tokens for the same seed.
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token id. logits: [vocab], any float dtype and device."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = self.distribution(logits.float().cpu())
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities [vocab] that tokens are drawn with, fp32. logits: fp32 [vocab]."""
        sampling = self._sampling
        logits = logits / sampling.temperature
        if 0 < sampling.top_k < len(logits):
            outside = torch.ones_like(logits, dtype=torch.bool)
            outside[logits.topk(sampling.top_k).indices] = False
            logits = logits.masked_fill(outside, -torch.inf)
        probabilities = logits.softmax(-1)
        if sampling.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            reached_before = ordered.cumsum(-1) - ordered >= sampling.top_p
            probabilities[order[reached_before]] = 0
            probabilities /= probabilities.sum()
        return probabilities
