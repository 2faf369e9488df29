"""cuda: NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

from ops.backends import Backend, Limits
from ops.backends.maca import sign
from ops.device import EnvFacts, names_model

CAPABILITIES = {
    "A100": (8, 0),
    "A800": (8, 0),
    "H100": (9, 0),
    "H800": (9, 0),
    "H200": (9, 0),
    "GH200": (9, 0),
    "H20": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
}
"""Models whose limits are known without a device."""
SHARED_KILOBYTES = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""Shared memory a block may opt into, CUDA C++ Programming Guide, compute capabilities; 99 elsewhere from 8.6 on."""


def probe(facts: EnvFacts) -> tuple:
    """Usable when torch sees a CUDA device that shows no sign of being another maker's. Capability is not asked."""
    if facts.version_hip is not None:
        return False, f"torch is built for ROCm {facts.version_hip}"
    maca = sign(facts)
    if maca:
        return False, f"this is a MetaX device ({maca})"
    if not facts.cuda_available:
        return False, "torch sees no CUDA device"
    if "nvidia" in facts.device_name.lower():
        return True, facts.device_name
    return True, f"unknown device name {facts.device_name!r}, taken for NVIDIA"


def caution(facts: EnvFacts) -> Optional[str]:
    """A device without its maker's name may be an impersonator that has no backend here yet."""
    if "nvidia" in facts.device_name.lower():
        return None
    return f"the device is called {facts.device_name!r} and is taken for NVIDIA's; OPS_BACKEND=reference avoids kernels"


def refine(limits: Limits, facts: EnvFacts) -> Limits:
    """Limits by what the device says, else by its compute capability, else by its model."""
    by_name = next((known for model, known in CAPABILITIES.items() if names_model(facts.device_name, model)), None)
    capability = facts.capability or by_name
    if capability is None:
        return limits
    kilobytes = SHARED_KILOBYTES.get(tuple(capability), 99)
    return replace(
        limits,
        shared_memory_bytes=facts.shared_memory_bytes or kilobytes * 1024,
        max_threads_per_block=facts.max_threads_per_block or limits.max_threads_per_block,
        max_num_ctas=8 if capability >= (9, 0) else 1,
        tensor_memory_access=capability >= (9, 0),
        fp8=capability >= (8, 9),
    )


BACKEND = Backend(
    name="cuda",
    rank=20,
    probe=probe,
    caution=caution,
    fallback=("reference",),
    optional_packages=("triton",),
    limits=Limits(
        warp_size=32,
        max_threads_per_block=1024,
        shared_memory_bytes=99 * 1024,
        registers_per_thread=255,
        registers_per_block=65536,
        max_num_ctas=1,
        min_dot_size=16,
        bf16_atomics=True,
        spin_between_programs=True,
        launch_options=frozenset({"maxnreg"}),
    ),
    refine=refine,
)
