"""What this machine can do at most: the rate of a large copy and of a large dense matrix product, measured."""

from __future__ import annotations

import torch

from sbtrain.bench.timing import release_memory, spread, time_steps

COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**26}
GEMM_SIZE = {"cuda": 8192, "cpu": 512}
NUM_STEPS, NUM_WARMUP = 20, 3


def ceilings(device: torch.device, dtype: torch.dtype) -> dict:
    """{"copy_gb_per_s": bytes read plus bytes written, "gemm_tflops": square matrices of random numbers in dtype, and
    their sizes}, medians."""
    size, copied = GEMM_SIZE[device.type], COPY_BYTES[device.type]
    copy_ms, gemm_ms = _copy_ms(copied, device), _gemm_ms(size, dtype, device)
    release_memory(device)
    return {
        "copy_gb_per_s": 2 * copied / copy_ms / 1e6,
        "copy_bytes": copied,
        "gemm_tflops": 2 * size**3 / gemm_ms / 1e9,
        "gemm_size": size,
        "gemm_dtype": str(dtype).removeprefix("torch."),
    }


def floor_ms(flops: float, moved: float, limits: dict) -> tuple[float, str]:
    """(shortest time that the ceilings allow, "TFLOP/s" or "GB/s": the ceiling that sets it)."""
    compute, memory = flops / limits["gemm_tflops"] / 1e9, moved / limits["copy_gb_per_s"] / 1e6
    return (compute, "TFLOP/s") if compute > memory else (memory, "GB/s")


def _copy_ms(num_bytes: int, device: torch.device) -> float:
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _median_ms(lambda: target.copy_(source), device)


def _gemm_ms(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return _median_ms(lambda: left @ right, device)


def _median_ms(work, device: torch.device) -> float:
    def step(mark) -> None:
        work()
        mark("work")

    return spread(time_steps(step, num_warmup=NUM_WARMUP, num_steps=NUM_STEPS, device=device).steps_ms)["median"]
