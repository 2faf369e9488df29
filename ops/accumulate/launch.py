"""Accumulation with Triton in one pass; shared by the backends' files."""

from __future__ import annotations

from typing import Mapping

import torch
import triton
from torch import Tensor

from ops.accumulate import reference, triton_kernels
from ops.launch import Launcher, Prepared

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Implementation:
    """ops.accumulate with the tile of a backend."""

    def __init__(self, backend: str):
        self.prepared = Prepared("accumulate", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.accumulate

    def accepts(self, name: str, total: Tensor, part: Tensor, *, add: bool) -> str | None:
        """Why a call cannot run here; None when it can."""
        if total.dtype != torch.float32 or not total.is_contiguous():
            return "takes a contiguous fp32 total"
        return None if part.dtype in DTYPES else "takes bf16, fp16 and fp32"

    @torch.no_grad()
    def accumulate(self, total, part, *, add):
        """See ops.accumulate."""
        if not part.is_contiguous() or not total.numel():
            return reference.accumulate(total, part, add=add)
        self.prepared(Kernels).launch(total, part, add=add)
        return total


class Kernels:
    """The kernel, adding and overwriting. launchers: both."""

    def __init__(self, entries: Mapping[str, Mapping]):
        tile = entries["accumulate"]
        self.block = tile["BLOCK"]
        self.launchers = [Launcher(triton_kernels.accumulate, dict(ADD=add), tile) for add in (False, True)]

    def launch(self, total: Tensor, part: Tensor, *, add: bool) -> None:
        """total += part, or total = part."""
        self.launchers[add]((triton.cdiv(total.numel(), self.block),), total, part, total.numel())
