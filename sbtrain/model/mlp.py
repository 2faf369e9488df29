"""The gated FFN: down(silu(gate x) · up x), megatron's MLP with our activation op."""

from __future__ import annotations

import torch
from torch import Tensor

import ops
from parallel import mcore
from parallel.recompute import rebuilt
from sbtrain.config.schema import Recompute


class GatedMLP(mcore.MLP):
    """linear_fc1 holds this rank's gate rows above its up rows; linear_fc2 is row-parallel. No biases."""

    def __init__(self, config: mcore.TransformerConfig, *, groups, recompute: Recompute = Recompute.none):
        submodules = mcore.MLPSubmodules(linear_fc1=mcore.ColumnParallelLinear, linear_fc2=mcore.RowParallelLinear)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)
        self._rebuilds = recompute is Recompute.activations

    def forward(self, x: Tensor, num_meta: int = 0) -> Tensor:
        """x [T,1,D] -> [T,1,D]. num_meta: its first rows that are meta tokens, rows like others here."""
        gate_up = self.linear_fc1(x)[0]
        active = ops.swiglu(gate_up)
        if not self._rebuilds or not torch.is_grad_enabled():
            return self.linear_fc2(active)[0]
        with rebuilt(active, lambda: ops.swiglu(gate_up)):
            return self.linear_fc2(active)[0]
