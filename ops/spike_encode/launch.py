"""Spike encodings with Triton: counts or spikes are read once, one small transfer to the host; shared by the backends'
files."""

from __future__ import annotations

from typing import Mapping

import torch
import triton
from torch import Tensor

from ops.launch import Launcher, Prepared
from ops.spike_encode import reference, triton_kernels
from ops.spike_encode.steps import COUNTED, NEGATIVE_SPIKES, check_bits, fitting_steps, raise_for

COUNT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SPIKE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.bool, *COUNT_DTYPES)


class Implementation:
    """ops.spike_encode with the tiles of a backend."""

    def __init__(self, backend: str):
        self.prepared = Prepared("spike_encode", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.spike_encode, self.spike_decode

    def accepts(self, name: str, x: Tensor, **options) -> str | None:
        """Why a call cannot run here; None when it can."""
        if name == "spike_decode":
            return None if x.dtype in SPIKE_DTYPES else "takes spikes in bf16, fp16, fp32, bool and integers"
        return None if x.dtype in COUNT_DTYPES else "takes counts in int8 to int64 and uint8"

    def spike_encode(self, count, *, encoding, num_steps=None, lsb_first=False):
        """See ops.spike_encode."""
        num_steps = fitting_steps(encoding, *reference.span(count), num_steps)
        spikes = torch.empty(num_steps, *count.shape, device=count.device)
        if spikes.numel():
            self.prepared(Kernels, encoding, bool(lsb_first)).encode(count.contiguous(), spikes)
        return spikes

    def spike_decode(self, spikes, *, encoding, lsb_first=False):
        """See ops.spike_encode."""
        if spikes.numel() == 0:
            return reference.spike_decode(spikes, encoding=encoding, lsb_first=lsb_first)
        if encoding not in COUNTED:
            check_bits(len(spikes))
        spikes = spikes.detach().contiguous()
        if spikes.dtype == torch.bool:
            spikes = spikes.view(torch.uint8)
        count = torch.empty(spikes.shape[1:], dtype=torch.int32, device=spikes.device)
        worst = self.prepared(Kernels, encoding, bool(lsb_first)).decode(spikes, count)
        raise_for(encoding, worst == 2, worst == 1)
        return count


class Kernels:
    """The kernels of one coding. launchers: all of them."""

    def __init__(self, encoding: str, lsb_first: bool, entries: Mapping[str, Mapping]):
        of_coding = dict(COUNTED=encoding in COUNTED, COMPLEMENT=encoding == "twos_complement", LSB_FIRST=lsb_first)
        of_coding["NEGATIVE"] = encoding in NEGATIVE_SPIKES
        self.entries = entries
        self._encode = Launcher(triton_kernels.encode, of_coding, entries["encode"])
        self._decode = Launcher(triton_kernels.decode, of_coding, entries["decode"])
        self.launchers = [self._encode, self._decode]

    def encode(self, count: Tensor, spikes: Tensor) -> None:
        """Fill spikes [num_steps, *count.shape]."""
        tile, num_steps = self.entries["encode"], len(spikes)
        grid = (triton.cdiv(count.numel(), tile["BLOCK"]) * triton.cdiv(num_steps, tile["STEPS"]),)
        self._encode(grid, count, spikes, count.numel(), num_steps)

    def decode(self, spikes: Tensor, count: Tensor) -> int:
        """Fill count; 2 where there are strange spikes, else 1 where a count is no int32, else 0."""
        num_programs = triton.cdiv(count.numel(), self.entries["decode"]["BLOCK"])
        problems = torch.empty(num_programs, dtype=torch.int32, device=spikes.device)
        self._decode((num_programs,), spikes, count, problems, count.numel(), len(spikes))
        return int(problems.max())
