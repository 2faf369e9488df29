"""Softmax attention mixers: F, full causal, and S, a sliding window (`window` keys, the query itself included)."""

from __future__ import annotations

import torch
from torch import Tensor

import ops
from parallel import mcore
from parallel.layout import SequenceAlgorithm
from parallel.sequence.shard import Documents
from parallel.sequence.table import mixing
from parallel.sequence.tail import tail
from sbtrain.config.schema import ModelConfig
from sbtrain.model.cache import LayerCache
from sbtrain.model.norm import RMSNorm
from sbtrain.model.projections import linear_proj, linear_qkv, split_qkv
from sbtrain.model.rotary import inverse_frequencies


class SoftmaxAttention(mcore.MegatronModule):
    """Grouped-query attention with RoPE, optional q/k norms before it, and an optional window."""

    def __init__(
        self,
        config: mcore.TransformerConfig,
        *,
        model: ModelConfig,
        groups,
        sp_algorithm: SequenceAlgorithm,
        window: int | None,
    ):
        super().__init__(config)
        self.window, self.head_dim, self.sp_group = window, model.head_dim, groups.cp
        self.num_heads, self.num_kv_heads = (n // groups.tp.size() for n in (model.num_heads, model.num_kv_heads))
        heads = dict(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        self.mix = mixing("F" if window is None else "S", sp_algorithm, **heads, window=window, group=groups.cp)
        self.linear_qkv = linear_qkv(config, groups.tp)
        self.linear_proj = linear_proj(config, groups.tp)
        self.q_norm = self._head_norm(model, groups.tp) if model.qk_norm else None
        self.k_norm = self._head_norm(model, groups.tp) if model.qk_norm else None
        self.inv_freq = inverse_frequencies(model)

    def _head_norm(self, model: ModelConfig, tp_group) -> RMSNorm:
        return RMSNorm(
            model.head_dim,
            eps=model.norm_eps,
            dtype=self.config.params_dtype,
            device=torch.cuda.current_device(),
            over_heads=lambda weight: mcore.copy_to_tensor_model_parallel_region(weight, group=tp_group),
        )

    def forward(self, x: Tensor, documents: Documents, cache: LayerCache | None = None) -> Tensor:
        """x [T/(sp·tp with tp_sequence_parallel),1,D] -> the same. cache: read and extended (see Documents.keepers);
        then the row is one document.
        """
        qkv, _ = self.linear_qkv(x)
        q, k, v = split_qkv(qkv, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        with torch.inference_mode(False):  # a later call may train
            inv_freq = self.inv_freq = self.inv_freq.to(q.device)
        q, k = ops.rope_qk(q, k, documents.positions[None], inv_freq)
        if cache is None:
            o = self.mix(q, k, v, cu_seqlens=documents.cu_seqlens)
        elif documents.keepers is not None:
            o = self._attend_over_shards(cache, q, k, v, documents)
        else:
            o = self._attend_with(cache, q, k, v)
        return self.linear_proj(o.reshape(o.shape[1], 1, -1))[0]

    def _attend_over_shards(self, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        kept = None if self.window is None else self.window - 1
        cache.key, cache.value = (tail(x, kept, keepers=documents.keepers, group=self.sp_group) for x in (k, v))
        return self.mix(q, k, v, cu_seqlens=documents.cu_seqlens)

    def _attend_with(self, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if cache.key is not None:
            k, v = torch.cat([cache.key, k], dim=1), torch.cat([cache.value, v], dim=1)
        kept = k.shape[1] if self.window is None else self.window - 1
        cache.key, cache.value = (
            k[:, k.shape[1] - kept :] if kept < k.shape[1] else k,
            v[:, -kept:] if kept else v[:, :0],
        )
        if q.shape[1] == 1:
            return _decode(q, k, v)
        # views would keep the whole chunk alive, q/k/v projection included
        cache.key, cache.value = cache.key.clone(), cache.value.clone()
        return ops.attention(q, k, v, window=self.window)


def _decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query against every given key. q [1,1,Hq,D], k and v [1,t,Hkv,D] -> [1,1,Hq,D]; softmax in fp32."""
    grouped = q.view(1, k.shape[2], -1, q.shape[-1]).float() * q.shape[-1] ** -0.5
    probabilities = torch.einsum("bhgd,bthd->bhgt", grouped, k.float()).softmax(-1)
    return torch.einsum("bhgt,bthd->bhgd", probabilities, v.float()).to(q.dtype).view_as(q)
