"""Backends: one file each, found by scanning this folder. Each holds BACKEND, its descriptor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional

from ops.device import EnvFacts


@dataclass(frozen=True)
class Limits:
    """What a kernel may ask of a device of this backend; None means that torch decides."""

    warp_size: Optional[int] = None
    shared_memory_bytes: Optional[int] = None
    max_num_warps: Optional[int] = None
    min_dot_size: Optional[int] = None
    tensor_memory_access: bool = False
    fp8: bool = False


@dataclass(frozen=True)
class Backend:
    """rank: probe order, lowest first. fallback: backends whose files may stand in, in order; an op with none of them
    is an error. probe(facts) -> (usable, why). contradiction(facts) -> what cannot be true at once, or None.
    optional_packages: a missing one makes an implementation unavailable; any other import failure is raised."""

    name: str
    rank: int
    probe: Callable[[EnvFacts], tuple]
    fallback: tuple = ()
    optional_packages: tuple = ()
    limits: Limits = Limits()
    contradiction: Callable[[EnvFacts], Optional[str]] = lambda facts: None
