"""What every token mixer is: projections to queries, keys and values, a core, and the projection of its output."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from parallel import mcore
from parallel.sequence.shard import Documents
from sbtrain.config.schema import ModelConfig
from sbtrain.model.cache import LayerCache
from sbtrain.model.projections import linear_proj, linear_qkv
from sbtrain.spiking.neuron import Sites


class Mixer(mcore.MegatronModule):
    """A mixer with its projections, or its core alone.

    own_projections: False where a pair has one set of projections for both mixers, and calls core itself.
    """

    def __init__(
        self,
        config: mcore.TransformerConfig,
        *,
        model: ModelConfig,
        groups,
        sites: Sites,
        own_projections: bool = True,
    ):
        super().__init__(config)
        self.head_dim = model.head_dim
        self.num_heads, self.num_kv_heads = (n // groups.tp.size() for n in (model.num_heads, model.num_kv_heads))
        if own_projections:
            self.linear_qkv = linear_qkv(config, groups.tp)
            self.linear_proj = linear_proj(config, groups.tp)
            self.spiked_output = sites.neuron("proj", cut=True)

    def forward(
        self, x: Tensor, gate_x: Tensor, documents: Documents, cache: LayerCache | None = None, norm=None
    ) -> Tensor:
        """x [T/(sp·tp with tp_sequence_parallel),1,D] -> the same. gate_x: x as a gate reads it, see SpikedInput.

        cache: read and replaced (see Documents.keepers); then the row is one document. norm: of what the output
        projection reads.
        """
        o = self.core(gate_x, self.linear_qkv(x)[0], documents, cache)
        o = o if norm is None else norm(o)
        return self.linear_proj(o if self.spiked_output is None else self.spiked_output(o))[0]

    @abstractmethod
    def core(self, gate_x: Tensor, qkv: Tensor, documents: Documents, cache: LayerCache | None) -> Tensor:
        """What comes before the output projection, [T/sp,1,Hq·head_dim] of a tp rank's heads.

        gate_x: what a gate reads; qkv [T/sp,1,Hkv·(G+2)·head_dim]: what linear_qkv makes of the mixer's input. Rows of
        meta tokens, whose number documents knows, come before the T/sp; with a cache they come alone, to be kept in it.
        """


def split_meta(documents: Documents, *tensors: Tensor):
    """Of each [1,num_meta + T/sp,...]: (those of the meta tokens, those of the others)."""
    num_meta = documents.num_meta
    return zip(*(x.split([num_meta, x.shape[1] - num_meta], dim=1) for x in tensors))
