"""Who is missing: decided from what is known of every rank, without clocks, threads or connections.

A rank is missing if it gives no sign of life, or if it is busy with its own work while others wait in a collective. The
ranks that wait cannot be to blame, whatever number their collective has: pipeline stages count differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NAMED = 8
"""Ranks that one line names; of more it gives the number."""
AGAIN = "start the same command again to go on from the newest checkpoint"


@dataclass(frozen=True)
class Sight:
    """One rank, as another sees it; times in seconds.

    name, number: its place, see parallel.place. waiting: it can only go on when other ranks, or its device, do.
    patient: it is at work that may take long. at: its line of Python. device: what its GPU has not finished.
    stayed_s: how long it has been in that place. frozen_s: how long its main thread has not moved at all. silent_s: how
    long it has been seen without a new sign of life, at least. left: its last sign said that it is done.
    """

    name: str = "between steps"
    number: int = 0
    waiting: bool = False
    patient: bool = False
    at: str = ""
    device: str = ""
    stayed_s: float = 0.0
    frozen_s: float = 0.0
    silent_s: float = 0.0
    left: bool = False

    @property
    def place(self) -> str:
        """Name, number and line, for people."""
        gpu = f", where its GPU has not finished {self.device}" if self.device else ""
        return f"'{self.name}' (no. {self.number}{', ' + self.at if self.at else ''}){gpu}"


@dataclass(frozen=True)
class Limits:
    """Seconds. timeout_s: the longest that ranks wait for one another. silent_s: a longer silence is death.

    broken_s: how long ago this rank lost a connection to another; None if it did not. Something is wrong for sure then,
    and nothing has to be waited for but the silence of the rank that is gone. gave_up: it lost none, but a collective
    waited for as long as torch lets it.
    """

    timeout_s: float
    silent_s: float
    broken_s: float | None = None
    gave_up: bool = False

    @property
    def broken(self) -> str:
        """What became of a collective that failed; empty if none did."""
        return "" if self.broken_s is None else "gave up waiting" if self.gave_up else "lost a connection"


def decide(sights: Sequence[Sight], who: Sequence[str], *, rank: int, limits: Limits) -> str | None:
    """One line that names the ranks that are missing and where, or None while nobody must be.

    sights, who: by rank; who is host and process, for people. rank: the one that asks.
    """
    mine, broken, timeout_s = sights[rank], limits.broken, limits.timeout_s
    if not broken and mine.stayed_s < timeout_s:
        return None
    present = [other for other in range(len(sights)) if not sights[other].left]
    others = [other for other in present if other != rank]
    silent = [other for other in others if sights[other].silent_s >= _longest_silence(sights[other], limits)]
    heard = [other for other in others if other not in silent]
    asks = rank if mine.waiting or broken else next((other for other in heard if sights[other].waiting), rank)
    waits = _wait(sights[asks], asks, broken)
    if silent:
        first = sights[silent[0]]
        least = min(sights[other].silent_s for other in silent)
        gone = f"no sign of life for {least:.0f} s, last seen in {first.place}"
        return f"{named(silent, who)}: {gone}; {waits}; {AGAIN}"
    if not broken and any(sights[other].patient and not sights[other].waiting for other in present):
        return None
    blamed = [other for other in present if limits.gave_up or not sights[other].patient]
    busy = [other for other in blamed if not sights[other].waiting and sights[other].stayed_s >= timeout_s]
    held_up = [other for other in present if sights[other].waiting and sights[other].frozen_s >= timeout_s]
    if busy and (held_up or broken) and busy != [rank]:
        first = sights[busy[0]]
        still = f"still in {first.place} after {first.stayed_s:.0f} s"
        return f"{named(busy, who)}: {still}; {waits}; {AGAIN}"
    if broken and limits.broken_s >= timeout_s:
        why = "one took too long" if limits.gave_up else "the network failed"
        return f"{waits}, but every rank gives signs of life: {why}; {AGAIN}"
    if min(sights[other].frozen_s if sights[other].waiting else 0.0 for other in present) >= 2 * timeout_s:
        return f"{_everyone(sights)}: a device or the network hangs; {AGAIN}"
    return None


def named(ranks: Sequence[int], who: Sequence[str]) -> str:
    """`rank 3 (host a, process 71)`; many are named by number and the host of the first."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} ({who[ranks[0]]})"
    listed = ", ".join(str(rank) for rank in ranks[:NAMED])
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"ranks {listed}{more} (the first is {who[ranks[0]]})"


def _longest_silence(sight: Sight, limits: Limits) -> float:
    """Seconds. What may take long may also hold Python's lock, and with it the signs of life, in one call."""
    return limits.timeout_s if sight.patient and (limits.gave_up or not limits.broken) else limits.silent_s


def _wait(sight: Sight, rank: int, broken: str) -> str:
    verb = broken or ("waits" if sight.waiting else "is")
    return f"rank {rank} {verb} in {sight.place}"


def _everyone(sights: Sequence[Sight]) -> str:
    """All wait: `all 4 ranks wait in ...`, who is elsewhere than the first of them, and who has left."""
    left = [rank for rank, sight in enumerate(sights) if sight.left]
    present = [rank for rank, sight in enumerate(sights) if not sight.left]
    first = sights[present[0]]
    elsewhere = [rank for rank in present if sights[rank].name != first.name]
    text = f"all {len(present)} ranks wait, none is missing: in {first.place}"
    if left:
        text = f"{len(present)} ranks wait and rank {left[0]} has left: in {first.place}"
    if elsewhere:
        text += f", rank {elsewhere[0]} in {sights[elsewhere[0]].place}"
    return text
