"""cuda: NVIDIA GPUs."""

from __future__ import annotations

from ops.backends import Backend, Limits
from ops.backends.maca import sign
from ops.device import EnvFacts


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


BACKEND = Backend(
    name="cuda",
    rank=20,
    probe=probe,
    fallback=("reference",),
    optional_packages=("triton", "fla", "einops"),
    limits=Limits(
        warp_size=32,
        shared_memory_bytes=99 * 1024,
        max_num_warps=32,
        min_dot_size=16,
        tensor_memory_access=True,
        fp8=True,
    ),
)
