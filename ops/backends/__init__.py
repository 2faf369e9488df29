"""Backends: one file each, found by scanning this folder. Each holds BACKEND, its descriptor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional

from ops.device import EnvFacts


@dataclass(frozen=True)
class Limits:
    """What a kernel may ask of a device. None: nothing to check, torch decides.

    private_bytes_per_thread: memory of one thread beyond its registers; where it is small, large tiles fail at launch.
    spin_between_programs: one program may wait for a flag that another sets. launch_options: what Triton's launcher
    takes on this backend beside sizes, num_warps, num_stages and num_ctas.
    """

    warp_size: Optional[int] = None
    max_threads_per_block: Optional[int] = None
    shared_memory_bytes: Optional[int] = None
    private_bytes_per_thread: Optional[int] = None
    registers_per_thread: Optional[int] = None
    registers_per_block: Optional[int] = None
    max_num_ctas: Optional[int] = None
    min_dot_size: Optional[int] = None
    bf16_atomics: bool = False
    tensor_memory_access: bool = False
    fp8: bool = False
    spin_between_programs: bool = False
    launch_options: frozenset = frozenset()

    @property
    def max_num_warps(self) -> Optional[int]:
        """Warps that a block can have."""
        return self.max_threads_per_block // self.warp_size if self.warp_size else None

    def describe(self) -> str:
        """The limits on one line."""
        shown = {name: value for name, value in vars(self).items() if value is not None}
        shown["launch_options"] = ", ".join(sorted(self.launch_options)) or "none"
        return ", ".join(f"{name}={value}" for name, value in shown.items())


@dataclass(frozen=True)
class Backend:
    """rank: probe order, lowest first. fallback: backends whose files may stand in, in order; an op with none of them
    is an error. probe(facts) -> (usable, why). contradiction(facts) -> what cannot be true at once, or None.
    caution(facts) -> what the user should hear about a usable device, or None.
    optional_packages: a missing one makes an implementation unavailable; any other import failure is raised.
    limits: of every device of this backend; refine(limits, facts) -> those of one device.
    emulated_on: backends on whose devices this one's files may run when OPS_EMULATE=1 asks for it.
    entries_have_source: tune entries must say whether they were measured, and where they come from."""

    name: str
    rank: int
    probe: Callable[[EnvFacts], tuple]
    fallback: tuple = ()
    optional_packages: tuple = ()
    limits: Limits = Limits()
    refine: Callable[[Limits, EnvFacts], Limits] = lambda limits, facts: limits
    contradiction: Callable[[EnvFacts], Optional[str]] = lambda facts: None
    caution: Callable[[EnvFacts], Optional[str]] = lambda facts: None
    emulated_on: tuple = ()
    entries_have_source: bool = False

    def limits_on(self, facts: EnvFacts) -> Limits:
        """Limits of the device of these facts; those of every device where it is not one of this backend's."""
        return self.refine(self.limits, facts) if self.probe(facts)[0] else self.limits

    def limits_of_model(self, device_model: str) -> Limits:
        """Limits of a device known by its model ("H100") alone; of every device for "default" and unknown models."""
        return self.refine(self.limits, EnvFacts(torch_version="", device_name=device_model))
