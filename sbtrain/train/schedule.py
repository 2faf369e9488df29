"""The learning rate by tokens: linear warmup, then constant, cosine or warmup-stable-decay (WSD) to min_lr."""

from __future__ import annotations

import math

from sbtrain.config.schema import Decay, Schedule


def learning_rate(schedule: Schedule, *, tokens: int, total_tokens: int) -> float:
    """Learning rate of the step that begins after `tokens` of the stage's `total_tokens`.

    Warmup rises linearly and never gives 0: the first step of a warmup of n tokens has lr/n times one token more.
    wsd holds lr and falls linearly to min_lr over the last decay_fraction of the stage.
    """
    if tokens < schedule.warmup_tokens:
        return schedule.lr * (tokens + 1) / (schedule.warmup_tokens + 1)
    if schedule.decay is Decay.constant:
        return schedule.lr
    if schedule.decay is Decay.cosine:
        start = schedule.warmup_tokens
        progress = min(1.0, (tokens - start) / max(1, total_tokens - start))
        return schedule.min_lr + (schedule.lr - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    start = total_tokens * (1 - schedule.decay_fraction)
    progress = min(1.0, max(0.0, (tokens - start) / max(1.0, total_tokens - start)))
    return schedule.lr + (schedule.min_lr - schedule.lr) * progress
