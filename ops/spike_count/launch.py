"""Spike counts and their values with Triton: one pass over x; shared by the backends' files."""

from __future__ import annotations

from typing import Mapping, Optional

import torch
import triton
from torch import Tensor

from ops.launch import Launcher, Prepared
from ops.spike_count import reference, triton_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Implementation:
    """ops.spike_count and ops.spike_values with the tiles of a backend. most_warps: of a program with a long row."""

    def __init__(self, backend: str, *, most_warps: int):
        self.most_warps = most_warps
        self.prepared = Prepared("spike_count", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.spike_count, self.spike_values

    def accepts(self, name: str, x: Tensor, **options) -> str | None:
        """Why a call cannot run here; None when it can."""
        return None if x.dtype in DTYPES else "takes bf16, fp16 and fp32"

    def spike_count(self, x, *, k=3.0, mean_abs=None):
        """See ops.spike_count."""
        if x.numel() == 0:
            return reference.spike_count(x, k=k, mean_abs=mean_abs)
        x = x.detach().contiguous()
        count = torch.empty(x.shape, dtype=torch.int32, device=x.device)
        threshold = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        self._kernels(x, mean_abs)(x, mean_abs, k, count=count, threshold=threshold)
        return count, threshold

    def spike_values(self, x, *, k=3.0, mean_abs=None):
        """See ops.spike_count."""
        if x.numel() == 0:
            return reference.spike_values(x, k=k, mean_abs=mean_abs)
        return _SpikeValues.apply(x, k, mean_abs, self._kernels(x, mean_abs))

    def _kernels(self, x: Tensor, mean_abs: Optional[Tensor]) -> Kernels:
        return self.prepared(Kernels, x.shape[-1], mean_abs is not None, self.most_warps)


class _SpikeValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, k, mean_abs, kernels):
        x = x.contiguous()
        x_hat = torch.empty_like(x)
        kernels(x, mean_abs, k, x_hat=x_hat)
        return x_hat

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


class Kernels:
    """The kernel for rows of one size, for counts and for values. launchers: both."""

    def __init__(self, size: int, has_mean: bool, most_warps: int, entries: Mapping[str, Mapping]):
        tile = _tile(size, entries["spikes"], most_warps)
        self.size, self.rows = size, tile["ROWS"]
        constants = dict(SIZE=size, HAS_MEAN=has_mean)
        self.launchers = [
            Launcher(triton_kernels.spikes, {**constants, "COUNTS": counts}, tile) for counts in (False, True)
        ]

    def __call__(
        self,
        x: Tensor,
        mean_abs: Optional[Tensor],
        k: float,
        *,
        count: Optional[Tensor] = None,
        threshold: Optional[Tensor] = None,
        x_hat: Optional[Tensor] = None,
    ) -> None:
        """Write count and threshold, or x_hat."""
        num_rows = x.numel() // self.size
        mean_abs = x if mean_abs is None else mean_abs.contiguous()
        outputs = (x, x, x_hat) if count is None else (count, threshold, x)
        grid = (triton.cdiv(num_rows, self.rows),)
        self.launchers[count is not None](grid, x, mean_abs, *outputs, num_rows, k)


def _tile(size: int, entry: Mapping, most_warps: int) -> dict:
    """The entry with ROWS and BLOCK for rows of this size.

    A program holds NUMBERS, in rows of the next power of two; longer rows get as many more warps, and rows of more than
    HELD numbers are read in parts of HELD.
    """
    block, numbers = min(triton.next_power_of_2(size), entry["HELD"]), entry["NUMBERS"]
    num_warps = entry["num_warps"]
    if block > numbers:
        num_warps = min(num_warps * block // numbers, most_warps)
    return {**entry, "ROWS": max(1, numbers // block), "BLOCK": block, "num_warps": num_warps}
