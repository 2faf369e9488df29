"""Health: every few steps, which rank is slow, how full memory and disk are, and how far apart the hosts' clocks.

Nothing here changes a step: it measures, and says once what people should look at.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_low

import torch
import torch.distributed as dist

from parallel.collectives import together
from parallel.mesh import Mesh
from parallel.pace import Pace
from parallel.place import primitive
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.config.schema import WatchConfig

KEPT, LEAST = 8, 6
"""Measurements whose lower quartile is usual for a rank, and the fewest that say that a rank is slow.

A slow rank is slow nearly always. One that is late by chance in a tenth of the steps has a high median now and then,
and among many ranks some always do.
"""
_BACK = 0.5
"""What was told is over when it is so far back from its limit to what is usual: figures near a limit are told once."""
_WARM_UP_STEPS = 2
"""Steps after a start in which ranks compile and tune kernels, each in its time."""


@dataclass(frozen=True)
class Measured:
    """What one rank measured; NaN where it could not. clock_s: its time when all ranks had just left a collective."""

    compute_s: float
    memory_share: float = math.nan
    num_retries: float = 0.0
    disk_free_bytes: float = math.nan
    clock_s: float = 0.0


class Health:
    """Of all ranks of a run; every rank has one, and they know the same."""

    def __init__(
        self,
        rules: WatchConfig,
        run_dir: str | Path,
        *,
        checkpoint_bytes: int = 0,
        keep_clocks: Callable[[dict[str, float]], None] | None = None,
    ):
        """checkpoint_bytes: of the next checkpoint. keep_clocks: told each host's clock, in seconds from the median.

        keep_clocks is called on all ranks alike.
        """
        self._rules, self._run_dir = rules, Path(run_dir)
        self._checkpoint_bytes, self._keep_clocks = checkpoint_bytes, keep_clocks
        self._said: set = set()
        self._pace: Pace | None = None

    def begin(self, mesh: Mesh) -> None:
        """Begin a stage, whose ranks stand for other parts of the model than before. Collective."""
        self._device, self._num_steps = mesh.device, 0
        self._said -= {said for said in self._said if isinstance(said, tuple)}  # ranks of another layout
        self._seconds: list[deque] = [deque(maxlen=KEPT) for _ in range(mesh.world_size)]
        self._clocks: dict[str, deque] = defaultdict(lambda: deque(maxlen=KEPT))
        ranks = [None] * mesh.world_size
        with primitive("names of hosts"):
            dist.all_gather_object(ranks, (platform.node(), mesh.pp_rank))
        self._hosts, self._kinds = [host for host, _ in ranks], [kind for _, kind in ranks]

    def measured(self, step: int) -> AbstractContextManager:
        """Context around the work of a step, up to its gradients; where its turn has come, compute time is measured."""
        self._num_steps += 1
        every = self._rules.measure_every_steps
        due = every > 0 and step % every == 0 and self._num_steps > _WARM_UP_STEPS
        self._pace = Pace(self._device) if due else None
        return self._pace or nullcontext()

    def check(self) -> dict:
        """After the step: what metrics.jsonl says of it; empty where nothing was measured. Collective where it was."""
        if self._pace is None:
            return {}
        rows = self._of_all([self._pace.compute_s(), *self._memory(), self._disk_free()])
        clocks = self._of_all([time.time()])  # all ranks have just left the exchange before
        self._pace = None
        return self.judge([Measured(*row, *clock) for row, clock in zip(rows, clocks)])

    def judge(self, ranks: list[Measured]) -> dict:
        """The metrics of what was measured, by rank; rank 0 prints what has become worth telling."""
        return {**self._judge_pace(ranks), **self._judge_room(ranks), **self._judge_clocks(ranks)}

    def _judge_pace(self, ranks: list[Measured]) -> dict:
        """Each rank's usual compute time, over the median one of the ranks with the same layers."""
        usual = []
        for kept, rank in zip(self._seconds, ranks, strict=True):
            kept.append(rank.compute_s)
            usual.append(sorted(kept)[len(kept) // 4])
        ratios = []
        for seconds, kind in zip(usual, self._kinds):
            like = [theirs for theirs, other in zip(usual, self._kinds) if other == kind]
            ratios.append(seconds / max(median_low(like), 1e-9))
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        limit = self._rules.slow_ratio
        for rank, ratio in enumerate(ratios):
            self._tell(
                ("slow", rank),
                ratio >= limit and len(self._seconds[rank]) >= LEAST,
                f"slow rank: rank {rank} (host {self._hosts[rank]}) computes {ratio:.2f} times as long as the ranks "
                f"with the same layers, without collectives (watch.slow_ratio={limit:g}), in most of the last "
                f"{len(self._seconds[rank])} measurements",
                is_over=ratio < 1 + _BACK * (limit - 1),
                over=f"rank {rank} (host {self._hosts[rank]}) is no longer slow: {ratio:.2f} times as long as its like",
            )
        return {
            "compute_time_s": median_low([rank.compute_s for rank in ranks]),
            "slowest_rank": slowest,
            "slowest_ratio": ratios[slowest],
        }

    def _judge_room(self, ranks: list[Measured]) -> dict:
        """Memory of the GPUs, and the disk as rank 0 sees it."""
        found: dict = {"disk_free_bytes": int(free) if math.isfinite(free := ranks[0].disk_free_bytes) else None}
        if math.isfinite(free):
            self._tell(
                "disk",
                free < 2 * self._checkpoint_bytes,
                f"disk: {free / 1e9:.1f} GB are free in {self._run_dir}, less than two checkpoints of "
                f"{self._checkpoint_bytes / 1e9:.1f} GB; free some space, or the run stops when it cannot save",
                is_over=free >= 3 * self._checkpoint_bytes,
            )
        shares = [rank.memory_share for rank in ranks]
        if not all(math.isfinite(share) for share in shares):
            return found
        fullest = max(range(len(shares)), key=shares.__getitem__)
        advice = "a smaller micro_batch, more recompute or another layout keeps away from the limit"
        self._tell(
            "memory",
            shares[fullest] >= self._rules.memory_share,
            f"memory: rank {fullest} (host {self._hosts[fullest]}) has used {shares[fullest]:.1%} of its GPU "
            f"(watch.memory_share={self._rules.memory_share:g}); {advice}",
            is_over=False,  # it is the most since the stage began
        )
        shortest = max(range(len(ranks)), key=lambda rank: ranks[rank].num_retries)
        if (retries := int(ranks[shortest].num_retries)) > 0:
            self._tell(
                "retries",
                True,
                f"memory: rank {shortest} (host {self._hosts[shortest]}) was short of memory {retries} times and had "
                f"to empty its cache, which takes time; {advice}",
            )
        return {**found, "memory_share": shares[fullest]}

    def _judge_clocks(self, ranks: list[Measured]) -> dict:
        """Each host's clock against their median: half of the spread of a collective is the error."""
        times_s = {host: ranks[self._hosts.index(host)].clock_s for host in dict.fromkeys(self._hosts)}
        usual_s = median(times_s.values())
        for host, time_s in times_s.items():
            self._clocks[host].append(time_s - usual_s)
        skews = {host: median(kept) for host, kept in self._clocks.items()}
        spread = max(skews.values()) - min(skews.values())
        ahead, behind = max(skews, key=skews.get), min(skews, key=skews.get)
        new = self._tell(
            "clocks",
            spread >= self._rules.clock_skew_s,
            f"clocks: host {ahead} is {spread:.1f} s ahead of host {behind} "
            f"(watch.clock_skew_s={self._rules.clock_skew_s:g}); set both by the same time server",
            is_over=spread < _BACK * self._rules.clock_skew_s,
        )
        if self._keep_clocks is not None and (new or len(self._clocks[ahead]) == 1):
            self._keep_clocks({host: round(skew, 3) for host, skew in skews.items()})
        return {"clock_skew_s": spread}

    def _tell(self, key, is_so: bool, text: str, *, is_over: bool = False, over: str = "") -> bool:
        """Print text when it has become so, and over when it is over. Returns whether it has become so.

        Between the two, what was said holds.
        """
        before = key in self._said
        if is_so and not before:
            self._say(f"warning: {text}")
            self._said.add(key)
        elif before and not is_so and is_over:
            self._say(over)
            self._said.discard(key)
        return is_so and not before

    @staticmethod
    def _say(text: str) -> None:
        if text and dist.get_rank() == 0:
            print(text, flush=True)

    def _of_all(self, numbers: list[float]) -> list[list[float]]:
        """The numbers of every rank."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        table = [torch.empty_like(own) for _ in self._hosts]
        with primitive("health of all ranks"):
            dist.all_gather(table, own)
            return torch.stack(table).tolist()

    def _memory(self) -> tuple[float, float]:
        """Most that was allocated and what others hold, over the GPU's memory; how often torch was short of it."""
        if self._device.type != "cuda":
            return math.nan, 0.0
        free, total = torch.cuda.mem_get_info()
        stats = torch.cuda.memory_stats()
        outside = total - free - stats["reserved_bytes.all.current"]
        return (stats["allocated_bytes.all.peak"] + max(outside, 0)) / total, float(stats["num_alloc_retries"])

    def _disk_free(self) -> float:
        if dist.get_rank():
            return math.nan
        try:
            return float(shutil.disk_usage(self._run_dir).free)
        except OSError:
            return math.nan


def keep_clocks(ledger: Ledger, check_lock: Callable[[], None], skews_s: dict[str, float]) -> None:
    """Keep in the ledger how far each host's clock is from their median. Collective.

    check_lock(): raises ValueError where another job has taken the run directory over; so does this then, on all
    ranks. A disk that is full stops no run for this.
    """

    def keep() -> None:
        first = dist.get_rank() == 0
        if first:
            check_lock()
        with suppress(OSError):
            ledger.record_clocks(skews_s, write=first)

    together(keep)
