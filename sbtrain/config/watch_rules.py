"""Rules of the recipe's blocks `watch` and `runtime`."""

from __future__ import annotations

import math

from sbtrain.config.schema import OnSpike, RuntimeConfig, WatchConfig

LONGEST_TIMEOUT_S = 1_000_000
"""Days; torch cannot count much further."""


def check_watch(watch: WatchConfig) -> None:
    """Raises ValueError: one line with the key and the fix."""
    least = {
        "max_skipped_steps": (watch.max_skipped_steps, 0),
        "window_steps": (watch.window_steps, 20),
        "spike_score": (watch.spike_score, 0),
        "max_rollbacks": (watch.max_rollbacks, 1),
        "measure_every_steps": (watch.measure_every_steps, 0),
        "slow_ratio": (watch.slow_ratio, 1.01),
        "clock_skew_s": (watch.clock_skew_s, 0.1),
    }
    for key, (value, smallest) in least.items():
        if not (math.isfinite(value) and value >= smallest):
            raise ValueError(f"watch.{key}={value} is too small or no number; give {smallest} or more")
    if watch.max_skipped_steps >= watch.window_steps:
        raise ValueError(
            f"watch.max_skipped_steps={watch.max_skipped_steps} of the last watch.window_steps={watch.window_steps} "
            "steps would never stop a run; give less than that"
        )
    if watch.on_spike is OnSpike.rollback and not watch.spike_score:
        raise ValueError("watch.on_spike=rollback needs spikes; set watch.spike_score above 0, or watch.on_spike=tell")
    if not 0 < watch.memory_share <= 1:
        raise ValueError(f"watch.memory_share={watch.memory_share} is no part of the memory; give more than 0, up to 1")


def check_runtime(runtime: RuntimeConfig) -> None:
    """Raises ValueError: one line with the key and the fix."""
    if not 1 <= runtime.timeout_s < LONGEST_TIMEOUT_S:
        raise ValueError(
            f"runtime.timeout_s={runtime.timeout_s} is no timeout; give at least 1 and less than "
            f"{LONGEST_TIMEOUT_S} seconds"
        )
