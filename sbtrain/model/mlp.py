"""The gated FFN: down(silu(gate x) · up x), megatron's MLP with our activation op, and neurons where it spikes."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel import mcore
from parallel.recompute import rebuilt
from sbtrain.config.schema import Recompute
from sbtrain.spiking.neuron import Sites, activated


class GatedMLP(mcore.MLP):
    """linear_fc1 holds this rank's gate rows above its up rows; linear_fc2 is row-parallel. No biases."""

    def __init__(self, config: mcore.TransformerConfig, *, groups, sites: Sites, recompute: Recompute = Recompute.none):
        submodules = mcore.MLPSubmodules(linear_fc1=mcore.ColumnParallelLinear, linear_fc2=mcore.RowParallelLinear)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)
        self.spiked_input, self.spiked_active = sites.neuron("gate_up"), sites.neuron("down", cut=True)
        self._rebuilds = recompute is Recompute.activations

    def forward(self, x: Tensor, num_meta: int = 0) -> Tensor:
        """x [T,1,D] -> [T,1,D]. num_meta: its first rows that are meta tokens, rows like others here."""
        gate_up = self.linear_fc1(x if self.spiked_input is None else self.spiked_input(x))[0]
        active, again = activated(gate_up, self.spiked_active)
        if not self._rebuilds or not torch.is_grad_enabled():
            return self.linear_fc2(active)[0]
        with rebuilt(active, again):
            return self.linear_fc2(active)[0]
