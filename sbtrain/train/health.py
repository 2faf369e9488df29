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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_low

import torch
import torch.distributed as dist

from parallel.mesh import Mesh
from parallel.pace import Pace
from parallel.place import primitive
from sbtrain.config.schema import WatchConfig

KEPT, LEAST = 5, 3
"""Measurements whose median counts, and the fewest that say that a rank is slow."""
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
        """checkpoint_bytes: of the next checkpoint. keep_clocks: told each host's clock, in seconds from the median."""
        self._rules, self._run_dir = rules, Path(run_dir)
        self._checkpoint_bytes, self._keep_clocks = checkpoint_bytes, keep_clocks
        self._said: set = set()
        self._pace: Pace | None = None

    def begin(self, mesh: Mesh) -> None:
        """Begin a stage, whose ranks stand for other parts of the model than before. Collective."""
        self._device, self._num_steps = mesh.device, 0
        self._ratios: list[deque] = [deque(maxlen=KEPT) for _ in range(mesh.world_size)]
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
        """Compute time over the median of the ranks with the same layers, then the median over measurements."""
        for rank, kind in enumerate(self._kinds):
            like = [ranks[other].compute_s for other, theirs in enumerate(self._kinds) if theirs == kind]
            self._ratios[rank].append(ranks[rank].compute_s / max(median_low(like), 1e-9))
        ratios = [median(kept) for kept in self._ratios]
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        for rank, ratio in enumerate(ratios):
            slow = ratio >= self._rules.slow_ratio and len(self._ratios[rank]) >= LEAST
            self._tell(
                ("slow", rank),
                slow,
                f"slow rank: rank {rank} (host {self._hosts[rank]}) computes {ratio:.2f} times as long as the ranks "
                f"with the same layers, without collectives (median of {len(self._ratios[rank])} measurements)",
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
                f"disk: {free / 1e9:.1f} GB are free in {self._run_dir}, and a checkpoint needs "
                f"{self._checkpoint_bytes / 1e9:.1f} GB; free some space, or the run stops when it cannot save",
            )
        shares = [rank.memory_share for rank in ranks]
        if all(math.isfinite(share) for share in shares):
            fullest = max(range(len(shares)), key=shares.__getitem__)
            found["memory_share"] = shares[fullest]
            retries = int(max(rank.num_retries for rank in ranks))
            self._tell(
                "memory",
                shares[fullest] >= self._rules.memory_share or retries > 0,
                f"memory: rank {fullest} (host {self._hosts[fullest]}) has used {shares[fullest]:.1%} of its GPU, and "
                f"a rank had to empty its cache {retries} times; a smaller micro_batch, more recompute or another "
                "layout keeps away from the limit",
            )
        return found

    def _judge_clocks(self, ranks: list[Measured]) -> dict:
        """Each host's clock against the median: half of the spread of a collective is the error."""
        usual = median(rank.clock_s for rank in ranks)
        for host in dict.fromkeys(self._hosts):
            first = self._hosts.index(host)
            self._clocks[host].append(ranks[first].clock_s - usual)
        skews = {host: median(kept) for host, kept in self._clocks.items()}
        spread = max(skews.values()) - min(skews.values())
        ahead, behind = max(skews, key=skews.get), min(skews, key=skews.get)
        new = self._tell(
            "clocks",
            spread >= self._rules.clock_skew_s,
            f"clocks: host {ahead} is {spread:.1f} s ahead of host {behind}; set both by the same time server",
        )
        if self._keep_clocks is not None and (new or len(self._clocks[ahead]) == 1):
            self._keep_clocks({host: round(skew, 3) for host, skew in skews.items()})
        return {"clock_skew_s": spread}

    def _tell(self, key, is_so: bool, text: str, *, over: str = "") -> bool:
        """Print text when it has become so, and over when it is so no longer. Returns whether it has become so."""
        before = key in self._said
        (self._said.add if is_so else self._said.discard)(key)
        if before != is_so and dist.get_rank() == 0 and (text if is_so else over):
            print(f"warning: {text}" if is_so else over, flush=True)
        return is_so and not before

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
