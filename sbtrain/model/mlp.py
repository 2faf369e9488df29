"""The gated FFN: down(silu(gate x) · up x), megatron's MLP with our activation op."""

from __future__ import annotations

from torch import Tensor

import ops
from parallel import mcore


class GatedMLP(mcore.MLP):
    """linear_fc1 holds this rank's gate rows above its up rows; linear_fc2 is row-parallel. No biases."""

    def __init__(self, config: mcore.TransformerConfig, *, groups):
        submodules = mcore.MLPSubmodules(linear_fc1=mcore.ColumnParallelLinear, linear_fc2=mcore.RowParallelLinear)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)

    def forward(self, x: Tensor, num_meta: int = 0) -> Tensor:
        """x [T,1,D] -> [T,1,D]. num_meta: leading rows of meta tokens, which are rows like others here."""
        return self.linear_fc2(ops.swiglu(self.linear_fc1(x)[0]))[0]
