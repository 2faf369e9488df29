"""L: grouped-query gated linear attention as in SpikingBrain-7B (report section 3.1; released modeling code) or 76B.

q = f(Wq x), k = f(Wk x), v = Wv x; f is relu (7B) or sigmoid (76B). No RoPE, unless model.gla.rope. The decay per kv
head and key channel comes from a low-rank gate, log decay = logsigmoid(W1 W0 x + b) / 16 (7B; W1 W0 is one matrix where
the gate is full_rank), or is tied to the key, decay = 1 - k (76B): log decay = -softplus(Wk x), from the pre-activation
since 1 - k rounds to 0, and before RoPE. Log decays are fp32. The output is RMS-normalized per head with one shared
weight.

Meta tokens come before every document: the state that they leave behind, from zero, is the one a document starts from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from parallel import mcore
from parallel.layout import SequenceAlgorithm
from parallel.sequence.shard import Documents
from parallel.sequence.table import mixing
from sbtrain.config.model_schema import FeatureMap, Gate, ModelConfig
from sbtrain.model.cache import LayerCache
from sbtrain.model.mixer import Mixer, split_meta
from sbtrain.model.norm import RMSNorm
from sbtrain.model.projections import split_qkv
from sbtrain.model.rotary import Rotary
from sbtrain.spiking.neuron import Sites

NEW = ("gate_down", "gate_up", "gate", "out_norm")
FEATURE_MAPS = {FeatureMap.relu: F.relu, FeatureMap.sigmoid: torch.sigmoid}


class GateDown(nn.Module):
    """The replicated bottleneck of the gate, hidden -> gate_rank, without bias."""

    def __init__(self, config: mcore.TransformerConfig, gate_rank: int):
        super().__init__()
        weight = torch.empty(
            gate_rank, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight = nn.Parameter(weight)
        # under tp_sequence_parallel each rank sees a part of the tokens, and the engine sums this gradient over tp
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., gate_rank]."""
        return F.linear(x, self.weight)


class GatedLinearAttention(Mixer):
    """The L mixer. Parameters the teacher does not have carry `is_new = True` for their own learning rate."""

    def __init__(
        self,
        config: mcore.TransformerConfig,
        *,
        model: ModelConfig,
        groups,
        sp_algorithm: SequenceAlgorithm,
        sites: Sites,
        own_projections: bool = True,
    ):
        super().__init__(config, model=model, groups=groups, sites=sites, own_projections=own_projections)
        self.gla, self.meta_in_state = model.gla, model.meta.in_state
        heads = dict(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        self.mix = mixing("L", sp_algorithm, **heads, group=groups.cp)
        self.rotary = Rotary(model) if self.gla.rope else None
        if self.gla.gate is Gate.low_rank:
            self.gate_down = GateDown(config, model.gla.gate_rank)
            self.gate_up = self._gate(model.gla.gate_rank, model, groups.tp)
        elif self.gla.gate is Gate.full_rank:
            self.gate = self._gate(model.hidden_size, model, groups.tp)
        self.out_norm = RMSNorm(
            model.head_dim,
            eps=model.norm_eps,
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
            over_heads=lambda weight: mcore.copy_to_tensor_model_parallel_region(weight, group=groups.tp),
        )
        for name, module in self.named_children():
            for parameter in module.parameters() if name in NEW else ():
                parameter.is_new = True

    def _gate(self, num_inputs: int, model: ModelConfig, tp_group) -> mcore.ColumnParallelLinear:
        """The projection to the decays of this rank's kv heads."""
        return mcore.ColumnParallelLinear(
            num_inputs,
            model.num_kv_heads * model.head_dim,
            config=self.config,
            init_method=self.config.init_method,
            bias=True,
            gather_output=False,
            tp_group=tp_group,
        )

    def core(self, gate_x: Tensor, qkv: Tensor, documents: Documents, cache: LayerCache | None) -> Tensor:
        """See Mixer.core."""
        q, k, v = split_qkv(qkv, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        q, k, log_decay = self._features(gate_x, q, k)
        if self.rotary is not None:
            q, k = self.rotary(q, k, documents.positions)
        if documents.num_meta:
            o = self._scan_with_meta(cache, (q, k, v, log_decay), documents)
        elif cache is None:
            o = self.mix(q, k, v, log_decay, cu_seqlens=documents.cu_seqlens)
        elif documents.keepers is not None:
            first = {} if cache.state is None else {"initial_state": cache.state[0]}
            o, cache.state = self.mix(q, k, v, log_decay, cu_seqlens=documents.cu_seqlens, return_state=True, **first)
        else:
            o, cache.state = ops.gla(q, k, v, log_decay, initial_state=cache.state, output_final_state=True)
        o = self.out_norm(o)
        return o.reshape(o.shape[1], 1, -1)

    def _features(self, gate_x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, log_decay in fp32, fp64 for fp64) from what the gate reads and the projections to queries and keys."""
        activation = FEATURE_MAPS[self.gla.feature_map]
        exact = torch.promote_types(k.dtype, torch.float32)
        if self.gla.gate is not Gate.tied:
            full_rank = self.gla.gate is Gate.full_rank
            gate, _ = self.gate(gate_x) if full_rank else self.gate_up(self.gate_down(gate_x))
            log_decay = F.logsigmoid(gate.to(exact)).view(*k.shape) / self.gla.gate_normalizer
            return activation(q), activation(k), log_decay
        bound = self.gla.lower_bound
        if bound == 0.0:
            return activation(q), activation(k), F.logsigmoid(-k.to(exact))
        log_decay = (bound + (1 - bound) * torch.sigmoid(-k.to(exact))).log()
        return activation(q), (1 - bound) * activation(k), log_decay

    def _scan_with_meta(self, cache: LayerCache | None, inputs: tuple[Tensor, ...], documents: Documents) -> Tensor:
        """inputs: q, k, v, log_decay."""
        meta, others = split_meta(documents, *inputs)
        o, state = ops.gla(*meta, output_final_state=self.meta_in_state)
        if cache is not None:
            cache.state = state
            return o
        first = {} if state is None else {"initial_state": state[0]}
        return torch.cat([o, self.mix(*others, cu_seqlens=documents.cu_seqlens, **first)], dim=1)
