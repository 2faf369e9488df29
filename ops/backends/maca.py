"""maca: MetaX GPUs (C500, C550). Their torch calls itself CUDA, so this is probed before cuda and never falls to it.

Tested by emulation of the published device facts only; never executed on MetaX hardware.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

from ops.backends import Backend, Limits
from ops.device import EnvFacts


def sign(facts: EnvFacts) -> Optional[str]:
    """What shows a MetaX torch or device, most reliable first; None without a sign."""
    if facts.version_maca:
        return f"torch.version.maca is {facts.version_maca}"
    if "+metax" in facts.torch_version:
        return f"torch is {facts.torch_version}"
    if "metax" in facts.device_name.lower():
        return f"the device is called {facts.device_name!r}"
    return None


def probe(facts: EnvFacts) -> tuple:
    """Usable when there is a sign and a device answers."""
    found = sign(facts)
    if not found:
        return False, "no sign of MetaX in torch or in the device name"
    if not facts.cuda_available:
        return False, f"{found}, but no device answers"
    return True, found


def contradiction(facts: EnvFacts) -> Optional[str]:
    """Facts about MetaX that cannot hold together: they mean a broken installation, and a guess would run the wrong
    kernels."""
    found = sign(facts)
    if found and "nvidia" in facts.device_name.lower():
        return f"{found}, but the device is called {facts.device_name!r}"
    if found and facts.version_hip is not None:
        return f"{found}, but torch is built for ROCm {facts.version_hip}"
    if found and facts.cuda_available and facts.triton_backend not in (None, "maca"):
        return f"{found}, but Triton compiles for {facts.triton_backend!r}: install MetaX's Triton"
    if not found and facts.triton_backend == "maca":
        return "Triton compiles for 'maca', but neither torch nor the device is MetaX's: install MetaX's torch"
    if not found and facts.maca_path and facts.cuda_available:
        return f"MACA_PATH is {facts.maca_path!r}, but torch drives {facts.device_name!r}: unset MACA_PATH"
    return None


def caution(facts: EnvFacts) -> Optional[str]:
    """MetaX's Triton needs MACA_PATH, and its Inductor knows its device by that variable alone."""
    return None if facts.maca_path else "MACA_PATH is not set: MetaX's Triton and torch.compile need it"


def refine(limits: Limits, facts: EnvFacts) -> Limits:
    """16 warps where the device says that it takes 1024 threads: reports differ, so 8 until then."""
    return replace(
        limits,
        shared_memory_bytes=facts.shared_memory_bytes or limits.shared_memory_bytes,
        max_threads_per_block=facts.max_threads_per_block or limits.max_threads_per_block,
        registers_per_block=facts.registers_per_multiprocessor or limits.registers_per_block,
    )


BACKEND = Backend(
    name="maca",
    rank=10,
    probe=probe,
    contradiction=contradiction,
    caution=caution,
    fallback=("reference",),
    optional_packages=("triton", "flash_attn", "mcoplib"),
    limits=Limits(
        warp_size=64,
        max_threads_per_block=512,
        shared_memory_bytes=64 * 1024,
        private_bytes_per_thread=4096,
        registers_per_block=131072,
        max_num_ctas=1,
        min_dot_size=16,
        launch_options=frozenset({"pipeline", "scenario", "pipeline_load_num", "extra_options"}),
    ),
    refine=refine,
    emulated_on=("cuda",),
    entries_have_source=True,
)
