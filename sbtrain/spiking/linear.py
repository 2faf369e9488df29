"""A projection of a model that is not trained: spike counts of its input times INT8 weights, as integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ops


class Int8Projection(nn.Module):
    """Stands where a projection of one tp rank and the neuron before it stood, with a quarter or half of the bytes.

    weight int8 [F, D], weight_scale fp32 [F, D / group, 1]: buffers, uninitialized. bias: the projection's parameter.
    k: of the neuron. Source of the arithmetic: ops.spike_linear.
    """

    def __init__(self, shape: tuple[int, int], *, group: int, k: float, bias: nn.Parameter | None, device):
        super().__init__()
        rows, columns = shape
        self.k, self.bias = k, bias
        self.register_buffer("weight", torch.empty(rows, columns, dtype=torch.int8, device=device))
        scales = torch.empty(rows, columns // group, 1, dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scales)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [..., D], no spikes yet -> (y [..., F] in x's dtype, None), as megatron's projections return."""
        return ops.spike_linear(x, self.weight, self.bias, k=self.k, weight_scale=self.weight_scale), None

    def extra_repr(self) -> str:
        """As torch prints it."""
        rows, columns = self.weight.shape
        return f"{columns} -> {rows}, k={self.k:g}, groups of {columns // self.weight_scale.shape[1]}"
