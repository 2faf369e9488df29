"""EnvFacts: all that backend selection may look at, collected once. The only file of ops that reads os.environ."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Mapping, Optional

import torch


@dataclass(frozen=True)
class EnvFacts:
    """Plain facts about torch, the device and the environment; selection is a pure function of them.

    version_*: torch.version.cuda, .hip and .maca. device_name is empty when no device answers. capability is shown
    but never decides anything: a MetaX C550 reports an A100's. triton_backend: backend of Triton's active target
    ("cuda", "hip", "maca"); None when Triton is absent or no device answers. overrides: OPS_BACKEND and OPS_BACKEND_*.
    """

    torch_version: str
    version_cuda: Optional[str] = None
    version_hip: Optional[str] = None
    version_maca: Optional[str] = None
    cuda_available: bool = False
    device_name: str = ""
    capability: Optional[tuple] = None
    warp_size: Optional[int] = None
    num_multiprocessors: Optional[int] = None
    shared_memory_bytes: Optional[int] = None
    triton_backend: Optional[str] = None
    maca_path: str = ""
    overrides: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """The facts on one line, for error messages and logs."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if value not in (None, "", {}))


@lru_cache(maxsize=1)
def collect() -> EnvFacts:
    """Facts of this process. Initializes the accelerator where there is one; imports Triton only then."""
    version = torch.version
    overrides = {
        key: value for key, value in os.environ.items() if key == "OPS_BACKEND" or key.startswith("OPS_BACKEND_")
    }
    facts = {
        "torch_version": torch.__version__,
        "version_cuda": version.cuda,
        "version_hip": version.hip,
        "version_maca": getattr(version, "maca", None),
        "cuda_available": torch.cuda.is_available(),
        "maca_path": os.environ.get("MACA_PATH", ""),
        "overrides": overrides,
    }
    if facts["cuda_available"]:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["device_name"] = properties.name
        facts["capability"] = (properties.major, properties.minor)
        facts["num_multiprocessors"] = properties.multi_processor_count
        facts["warp_size"] = getattr(properties, "warp_size", None)
        facts["shared_memory_bytes"] = getattr(properties, "shared_memory_per_block_optin", None)
        facts["triton_backend"] = _triton_backend()
    return EnvFacts(**facts)


def _triton_backend() -> Optional[str]:
    try:
        from triton.runtime import driver
    except ImportError:
        return None
    return driver.active.get_current_target().backend
