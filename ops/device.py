"""EnvFacts: all that backend selection may look at, collected once. The only file of ops that reads os.environ."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Mapping, Optional

import torch


@dataclass(frozen=True)
class EnvFacts:
    """Plain facts about torch, the device and the environment; selection is a pure function of them.

    version_*: torch.version.cuda, .hip and .maca. device_name is empty when no device answers. capability is shown
    but never decides whose device it is: a MetaX C550 reports an A100's. max_threads_per_block and below are None
    where torch does not tell. triton_backend: backend of Triton's active target ("cuda", "hip", "maca"); None when
    Triton is absent or no device answers. triton_error: how Triton failed to name it. overrides: OPS_BACKEND and
    OPS_BACKEND_*. emulate: OPS_EMULATE=1, a foreign backend may be forced.
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
    max_threads_per_block: Optional[int] = None
    registers_per_multiprocessor: Optional[int] = None
    triton_backend: Optional[str] = None
    triton_error: str = ""
    maca_path: str = ""
    overrides: Mapping[str, str] = field(default_factory=dict)
    emulate: bool = False

    def describe(self) -> str:
        """The facts on one line, for error messages and logs."""
        shown = {name: value for name, value in vars(self).items() if value not in (None, "", {}, False)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def to_json(self) -> dict:
        """The facts as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping) -> EnvFacts:
        """The facts of another machine, as its to_json wrote them."""
        capability = facts.get("capability")
        return cls(**{**facts, "capability": tuple(capability) if capability else None})


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
        "emulate": _switch("OPS_EMULATE"),
    }
    if facts["cuda_available"]:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["device_name"] = properties.name
        facts["capability"] = (properties.major, properties.minor)
        facts["num_multiprocessors"] = properties.multi_processor_count
        facts["warp_size"] = getattr(properties, "warp_size", None)
        facts["shared_memory_bytes"] = getattr(properties, "shared_memory_per_block_optin", None)
        facts["max_threads_per_block"] = getattr(properties, "max_threads_per_block", None)
        facts["registers_per_multiprocessor"] = getattr(properties, "regs_per_multiprocessor", None)
        facts["triton_backend"], facts["triton_error"] = _triton()
    return EnvFacts(**facts)


def outside_packages() -> tuple[str, ...]:
    """Packages named in OPS_MODULES (commas between them) whose folders hold more ops and backends."""
    return tuple(name.strip() for name in os.environ.get("OPS_MODULES", "").split(",") if name.strip())


def device_model(device_name: str) -> str:
    """What tune entries call a device: "NVIDIA H100 80GB HBM3" -> "H100", "NVIDIA GeForce RTX 4090" -> "RTX 4090"."""
    name = re.sub(r"\b(NVIDIA|MetaX|GeForce|Tesla|Quadro)\b", "", device_name, flags=re.I)
    words = re.split(r"[\s-]+", name.strip())
    return " ".join(words[:2]) if words[0].upper() in ("RTX", "GTX") else words[0]


def names_model(device_name: str, model: str) -> bool:
    """Whether a device's name holds the model as whole words: a GH200 is no H200."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(model)}(?![A-Za-z0-9])", device_name, re.I) is not None


def _triton() -> tuple[Optional[str], str]:
    """(backend of the active target, how Triton failed to name it). A failure is a fact: selection reports it."""
    try:
        from triton.runtime import driver
    except ImportError:
        return None, ""
    try:
        return driver.active.get_current_target().backend, ""
    except Exception as error:  # whatever a vendor's driver raises
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable}={value}: must be 0 or 1")
    return value == "1"
