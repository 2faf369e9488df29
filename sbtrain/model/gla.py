"""L: grouped-query gated linear attention as in SpikingBrain-7B (report section 3.1; released modeling code).

q = relu(Wq x), k = relu(Wk x), v = Wv x, no RoPE; a decay per kv head and key channel from a low-rank gate,
log decay = logsigmoid(W1 W0 x + b) / 16 in fp32; the output is RMS-normalized per head with one shared weight.
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
from sbtrain.config.schema import ModelConfig
from sbtrain.model.cache import LayerCache
from sbtrain.model.norm import RMSNorm
from sbtrain.model.projections import linear_proj, linear_qkv, split_qkv


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


class GatedLinearAttention(mcore.MegatronModule):
    """The L mixer. Parameters the teacher does not have carry `is_new = True` for their own learning rate."""

    def __init__(self, config: mcore.TransformerConfig, *, model: ModelConfig, groups, sp_algorithm: SequenceAlgorithm):
        super().__init__(config)
        self.head_dim, self.gate_normalizer = model.head_dim, model.gla.gate_normalizer
        self.num_heads, self.num_kv_heads = (n // groups.tp.size() for n in (model.num_heads, model.num_kv_heads))
        heads = dict(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        self.mix = mixing("L", sp_algorithm, **heads, group=groups.cp)
        self.linear_qkv = linear_qkv(config, groups.tp)
        self.linear_proj = linear_proj(config, groups.tp)
        self.gate_down = GateDown(config, model.gla.gate_rank)
        self.gate_up = mcore.ColumnParallelLinear(
            model.gla.gate_rank,
            model.num_kv_heads * model.head_dim,
            config=config,
            init_method=config.init_method,
            bias=True,
            gather_output=False,
            tp_group=groups.tp,
        )
        self.out_norm = RMSNorm(
            model.head_dim,
            eps=model.norm_eps,
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
            over_heads=lambda weight: mcore.copy_to_tensor_model_parallel_region(weight, group=groups.tp),
        )
        for module in (self.gate_down, self.gate_up, self.out_norm):
            for parameter in module.parameters():
                parameter.is_new = True

    def forward(self, x: Tensor, documents: Documents, cache: LayerCache | None = None) -> Tensor:
        """x [T/(sp·tp with tp_sequence_parallel),1,D] -> the same. cache: read and replaced (see Documents.keepers);
        then the row is one document.
        """
        qkv, _ = self.linear_qkv(x)
        q, k, v = split_qkv(qkv, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        gate, _ = self.gate_up(self.gate_down(x))
        log_decay = F.logsigmoid(gate.float()).view(*k.shape) / self.gate_normalizer
        q, k = F.relu(q), F.relu(k)
        if cache is None:
            o = self.mix(q, k, v, log_decay, cu_seqlens=documents.cu_seqlens)
        elif documents.keepers is not None:
            o, cache.state = self.mix(q, k, v, log_decay, cu_seqlens=documents.cu_seqlens, return_state=True)
        else:
            o, cache.state = ops.gla(q, k, v, log_decay, initial_state=cache.state, output_final_state=True)
        o = self.out_norm(o)
        return self.linear_proj(o.reshape(o.shape[1], 1, -1))[0]
