"""The experts of this rank as two grouped matrix products, and the experts that every token goes to."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

import ops
from parallel import mcore
from parallel.recompute import rebuilt, recomputed
from sbtrain.spiking.neuron import Neuron, activated


class Experts(mcore.MegatronModule):
    """num_local SwiGLU experts: linear_fc1 [L, 2F, D], gate rows above up rows, and linear_fc2 [L, D, F].

    Their gradients are summed over the ranks that hold the same experts, not over all data-parallel ranks. grouped_ffn
    computes with them.
    """

    def __init__(self, config: mcore.TransformerConfig, *, num_experts: int, ffn_size: int, groups):
        super().__init__(config)
        self._ep_group, self._edp_group = groups.ep, groups.expt_dp
        num_local, hidden = num_experts // groups.ep.size(), config.hidden_size
        options = dict(dtype=config.params_dtype, device=torch.cuda.current_device())
        self.linear_fc1 = nn.Parameter(torch.empty(num_local, 2 * ffn_size, hidden, **options))
        self.linear_fc2 = nn.Parameter(torch.empty(num_local, hidden, ffn_size, **options))
        for weight in (self.linear_fc1, self.linear_fc2):
            weight.allreduce = False  # megatron: reduce over the expert-data-parallel group, whatever ep is
            weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The experts as parts of the global tensors [E, 2F, D] and [E, D, F], cut along E by ep."""
        place = (len(sharded_offsets), self._ep_group.rank(), self._ep_group.size())
        return {
            f"{prefix}{name}": mcore.ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                weight,
                *sharded_offsets,
                place,
                replica_id=(0, 0, self._edp_group.rank()),
                prepend_axis_num=len(sharded_offsets),
            )
            for name, weight in self.named_parameters()
        }


def grouped_ffn(
    x: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    offsets: Tensor,
    neuron: Neuron | None = None,
    counted: Tensor | None = None,
    *,
    rebuild: bool = False,
) -> Tensor:
    """SwiGLU FFNs of groups of rows. x [R, D] -> [R, D]; rebuild: the activations are made again in the backward.

    neuron: that of the down projections, None where they do not spike. counted: as `Neuron.spike` takes it.
    """
    gate_up = ops.grouped_mm(x, fc1, offsets=offsets)
    active, again = activated(gate_up, neuron, counted)
    if not rebuild:
        return ops.grouped_mm(active, fc2, offsets=offsets)
    with rebuilt(active, again):
        return ops.grouped_mm(active, fc2, offsets=offsets)


class SharedExperts(mcore.MLP):
    """The experts that every token goes to, as one gated FFN of their joint width, sharded over tp.

    Its two halves are called apart, so that each runs while rows travel.
    """

    def __init__(self, config: mcore.TransformerConfig, *, ffn_size: int, groups, neuron: Neuron | None = None):
        """neuron: that of its down projection, which reads a tp rank's part of the channels."""
        submodules = mcore.MLPSubmodules(linear_fc1=mcore.ColumnParallelLinear, linear_fc2=mcore.RowParallelLinear)
        config = copy(config)
        config.ffn_hidden_size = ffn_size  # what linear_fc2 is built by
        super().__init__(config, submodules, ffn_hidden_size=ffn_size, tp_group=groups.tp)
        self.spiked_active = neuron

    def forward(self, x: Tensor) -> Tensor:
        """x [T,1,D] -> [T,1,D]."""
        return self.linear_fc2(activated(self.linear_fc1(x)[0], self.spiked_active)[0])[0]

    def first_half(self, x: Tensor, *, rebuild: bool, recompute: bool) -> tuple:
        """What second_half goes on from. rebuild: the activations are made again; recompute: all of it."""
        if recompute:
            return recomputed(self.forward, x), None
        active, again = activated(self.linear_fc1(x)[0], self.spiked_active)
        return active, again if rebuild else None, self.linear_fc2

    def second_half(self, half: tuple) -> Tensor:
        """[T,1,D] from first_half's result."""
        if len(half) == 2:
            return half[0]
        active, again, linear = half
        if again is None:
            return linear(active)[0]
        with rebuilt(active, again):
            return linear(active)[0]
