"""SwiGLU with Triton: one pass forward, one pass backward; shared by the backends' files."""

from __future__ import annotations

from typing import Mapping

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.launch import Launcher, Prepared
from ops.swiglu import reference, triton_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Implementation:
    """ops.swiglu with the tiles of a backend."""

    def __init__(self, backend: str):
        self.prepared = Prepared("swiglu", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.swiglu

    def accepts(self, name: str, gate_up: Tensor) -> str | None:
        """Why a call cannot run here; None when it can."""
        return None if gate_up.dtype in DTYPES else "takes bf16, fp16 and fp32"

    def swiglu(self, gate_up):
        """See ops.swiglu."""
        if gate_up.numel() == 0:
            return reference.swiglu(gate_up)
        return _SwiGLU.apply(gate_up, self.prepared(Kernels, gate_up.shape[-1] // 2))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, kernels):
        ctx.kernels, gate_up = kernels, gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        y = gate_up.new_empty(*gate_up.shape[:-1], kernels.size)
        kernels.launch("forward", y, gate_up, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (gate_up,), grad_y = ctx.saved_tensors, grad_y.contiguous()
        grad = torch.empty_like(gate_up)
        ctx.kernels.launch("backward", grad_y, grad_y, gate_up, grad)
        return grad, None


class Kernels:
    """The kernels for outputs of `size` columns. launchers: all of them."""

    def __init__(self, size: int, entries: Mapping[str, Mapping]):
        self.size, self.parts = size, {name: triton.cdiv(size, tile["BLOCK"]) for name, tile in entries.items()}
        self._by_name = {
            name: Launcher(getattr(triton_kernels, name), dict(SIZE=size), tile) for name, tile in entries.items()
        }
        self.launchers = list(self._by_name.values())

    def launch(self, name: str, rows: Tensor, *arguments: Tensor) -> None:
        """Kernel `name` on every row of `rows` [..., size]."""
        self._by_name[name]((rows.numel() // self.size, self.parts[name]), *arguments)
