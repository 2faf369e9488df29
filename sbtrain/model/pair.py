"""(LS), (LF): two mixers on one normed input, their outputs normalized and averaged (SpikingBrain-76B).

With projections of their own each branch is a whole mixer, and its norm comes behind its output projection:

    y = 1/2 (norm_L(L(x)) + norm_S(S(x)))

or, with model.pair.norm_place=before_projection, before it, over the channels of all heads. With shared ones there is
one q, k, v projection before the branches' cores and one output projection behind the average, and the norms always
come before it. Source: SpikingBrain report, section 2.2 and figure 3, which leave both open; norms behind the
projections are those of SpikingBrain2.0, before them those of Hymba.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel import mcore
from parallel.sequence.shard import Documents
from sbtrain.config.schema import ModelConfig
from sbtrain.model.cache import LayerCache
from sbtrain.model.norm import AllHeadsNorm, RMSNorm
from sbtrain.model.projections import linear_proj, linear_qkv
from sbtrain.spiking.neuron import Sites


class BySymbol(mcore.MegatronModule):
    """A module for each branch, by its symbol."""

    def __init__(self, config: mcore.TransformerConfig, modules: dict[str, torch.nn.Module]):
        super().__init__(config)
        for symbol, module in modules.items():
            self.add_module(symbol, module)

    def items(self):
        """(symbol, module) of each branch."""
        return self.named_children()

    def __getitem__(self, symbol: str) -> torch.nn.Module:
        return getattr(self, symbol)


class Pair(mcore.MegatronModule):
    """Two mixers in parallel. The norms of their outputs carry `is_new = True`.

    branches: what builds each mixer, by its symbol; without projections where the pair shares them.
    """

    def __init__(
        self,
        config: mcore.TransformerConfig,
        *,
        model: ModelConfig,
        groups,
        sites: Sites,
        branches: dict[str, mcore.ModuleSpec],
    ):
        super().__init__(config)
        self.shared, self.norms_before = model.pair.shared_projections, model.pair.norms_before_projection
        if self.shared:
            self.linear_qkv = linear_qkv(config, groups.tp)
            self.linear_proj = linear_proj(config, groups.tp)
            self.spiked_output = sites.neuron("proj", cut=True)
        built = {symbol: mcore.build_module(spec, config) for symbol, spec in branches.items()}
        self.branches = BySymbol(config, built)
        self.merge_norms = BySymbol(config, {symbol: self._merge_norm(model, groups) for symbol in branches})
        for parameter in self.merge_norms.parameters():
            parameter.is_new = True

    def _merge_norm(self, model: ModelConfig, groups) -> torch.nn.Module:
        about = dict(eps=model.norm_eps, dtype=self.config.params_dtype, device=torch.cuda.current_device())
        if self.norms_before:
            return AllHeadsNorm(model.num_heads * model.head_dim, tp_group=groups.tp, **about)
        return RMSNorm(model.hidden_size, sequence_parallel=self.config.sequence_parallel, **about)

    def forward(self, x: Tensor, gate_x: Tensor, documents: Documents, cache: LayerCache | None = None) -> Tensor:
        """See Mixer.forward; one branch keeps a state in the cache, the other keys and values."""
        if self.norms_before and not self.shared:
            branches = ((branch, self.merge_norms[symbol]) for symbol, branch in self.branches.items())
            first, second = (branch(x, gate_x, documents, cache, norm) for branch, norm in branches)
            return 0.5 * (first + second)
        if not self.shared:
            return self._merged(
                {symbol: branch(x, gate_x, documents, cache) for symbol, branch in self.branches.items()}
            )
        qkv, _ = self.linear_qkv(x)
        o = self._merged(
            {symbol: branch.core(gate_x, qkv, documents, cache) for symbol, branch in self.branches.items()}
        )
        return self.linear_proj(o if self.spiked_output is None else self.spiked_output(o))[0]

    def _merged(self, outputs: dict[str, Tensor]) -> Tensor:
        first, second = (self.merge_norms[symbol](o) for symbol, o in outputs.items())
        return 0.5 * (first + second)
