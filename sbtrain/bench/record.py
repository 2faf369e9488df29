"""What a benchmark leaves behind: the facts of the machine, an aligned table, a JSON file."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from sbtrain.checkpoint.files import write_json

PACKAGES = ("triton", "megatron-core", "fla-core", "liger-kernel", "flash-attn", "transformer-engine", "apex")
"""Whose versions decide how fast a step is."""

DENSE_BF16_TFLOPS = {"H100 80GB HBM3": 989.4, "H200": 989.4}
"""Peak of one GPU by a part of its name (NVIDIA's data sheets, without sparsity)."""


def machine(device: torch.device) -> dict:
    """GPU, versions and commit, as JSON values; null for what is not there."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def peak_tflops(device: torch.device, given: float) -> float:
    """The peak that MFU divides by: the given one, else the device's, else 0 for unknown."""
    if given or device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in DENSE_BF16_TFLOPS.items() if part in name), 0.0)


def save(folder: str, name: str, value: dict) -> Path:
    """Write value as folder/name, which is created where it does not exist. Raises ValueError if it cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / name, value)
    except OSError as error:
        raise ValueError(f"out={folder} cannot be written ({error.strerror}); choose another folder") from None
    return path / name


def aligned(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])


def shown(value: float | None, form: str) -> str:
    """The value in this format, or a dash for None."""
    return "-" if value is None else format(value, form)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, marked where it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
