"""The decoder: pre-norm residual layers of mixed kinds, the part that lives on this pipeline stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel import mcore
from parallel.layout import SequenceAlgorithms
from parallel.recompute import recomputed
from parallel.sequence.shard import Documents
from sbtrain.config.model_schema import Gate
from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.config.pattern import LayerKind
from sbtrain.config.schema import ModelConfig, Recompute
from sbtrain.model.cache import Cache
from sbtrain.model.norm import RMSNorm
from sbtrain.model.spec import layer_modules
from sbtrain.spiking.neuron import Sites, SpikedInput


def residual_norm(config: mcore.TransformerConfig, model: ModelConfig) -> RMSNorm:
    """RMSNorm over the residual stream, aware of tp_sequence_parallel."""
    return RMSNorm(
        model.hidden_size,
        eps=model.norm_eps,
        dtype=config.params_dtype,
        device=torch.cuda.current_device(),
        sequence_parallel=config.sequence_parallel,
    )


class DecoderLayer(mcore.MegatronModule):
    """x += mixer(norm(x)); x += ffn(norm(x))."""

    def __init__(
        self,
        config,
        kind: LayerKind,
        *,
        index: int,
        model: ModelConfig,
        groups,
        recompute: Recompute,
        sp_algorithm: SequenceAlgorithms,
        experts: ExpertsConfig,
    ):
        super().__init__(config)
        self.kind, self.index, self.recompute = kind, index, recompute
        self.tp_rank = groups.tp.rank()
        self.input_layernorm = residual_norm(config, model)
        sites = Sites(model.spiking, layer=index, tp_group=groups.tp)
        self.spiked_input = SpikedInput(sites, gated="L" in kind.mixers and model.gla.gate is not Gate.tied)
        self.self_attention, self.mlp = layer_modules(
            kind,
            config,
            model=model,
            groups=groups,
            sp_algorithm=sp_algorithm,
            recompute=recompute,
            experts=experts,
            sites=sites,
        )
        self.pre_mlp_layernorm = residual_norm(config, model)

    def forward(self, x: Tensor, documents: Documents, cache: Cache | None = None) -> Tensor:
        """x [num_meta+T,1,D] -> the same; see Mixer.forward."""
        if self.recompute is Recompute.full and torch.is_grad_enabled():
            return recomputed(self._run, x, documents, cache)
        return self._run(x, documents, cache)

    def _run(self, x: Tensor, documents: Documents, cache: Cache | None) -> Tensor:
        layer_cache = None if cache is None else cache.layer(self.index)
        mixed = self.self_attention(*self.spiked_input(self.input_layernorm(x)), documents, layer_cache)
        # a mixture of experts sees to it itself: rows must not travel again
        if self.recompute is Recompute.selective and not self.kind.moe and torch.is_grad_enabled():
            x = x + mixed
            return x + recomputed(self._ffn, x, self._num_meta(x, documents))
        normed, x = self.pre_mlp_layernorm(mixed, residual=x)
        return x + self.mlp(normed, self._num_meta(x, documents))

    def _ffn(self, x: Tensor, num_meta: int) -> Tensor:
        return self.mlp(self.pre_mlp_layernorm(x), num_meta)

    def _num_meta(self, x: Tensor, documents: Documents) -> int:
        """How many of this rank's rows x are meta tokens': the first ones, over all ranks of tp_sequence_parallel."""
        before = self.tp_rank * x.shape[0] if self.config.sequence_parallel else 0
        return min(max(documents.num_meta - before, 0), x.shape[0])


class Decoder(mcore.MegatronModule):
    """The layers of one pipeline stage, and the final norm on the last one.

    layers: the 0-based global indices this stage holds. Checkpoint keys carry the global index.
    """

    def __init__(
        self,
        config,
        kinds,
        *,
        layers: range,
        last: bool,
        model: ModelConfig,
        groups,
        recompute: Recompute,
        sp_algorithm: SequenceAlgorithms,
        experts: ExpertsConfig,
    ):
        super().__init__(config)
        self.first_layer = layers.start
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                kinds[i],
                index=i,
                model=model,
                groups=groups,
                recompute=recompute,
                sp_algorithm=sp_algorithm,
                experts=experts,
            )
            for i in layers
        )
        self.final_layernorm = residual_norm(config, model) if last else None

    def forward(self, x: Tensor, documents: Documents, cache: Cache | None = None) -> Tensor:
        """x [T,1,D] -> [T,1,D]."""
        for layer in self.layers:
            x = layer(x, documents, cache)
        return x if self.final_layernorm is None else self.final_layernorm(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron's sharded state dict, keyed by the global layer index so that any pipeline split can load it."""
        state = {}
        for local, layer in enumerate(self.layers):
            here, there = f"{prefix}layers.{local}.", f"{prefix}layers.{local + self.first_layer}."
            part = layer.sharded_state_dict(here, sharded_offsets, metadata)
            mcore.replace_prefix_for_sharding(part, here, there)
            state.update(part)
        if self.final_layernorm is not None:
            norm = mcore.sharded_state_dict_default(
                self.final_layernorm, f"{prefix}final_layernorm.", sharded_offsets, metadata
            )
            state.update(norm)
        return state
