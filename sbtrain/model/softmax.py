"""Softmax attention mixers: F, full causal, and S, a sliding window (`window` keys, the query itself included).

Meta tokens see one another, both ways, and nothing else; every other query sees their keys too, whatever its document
and its window, in one softmax with those of its own (SpikingBrain report, section 2.2).
"""

from __future__ import annotations

from functools import reduce

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
from sbtrain.model.mixer import Mixer, split_meta
from sbtrain.model.norm import RMSNorm
from sbtrain.model.projections import split_qkv
from sbtrain.model.rotary import Rotary
from sbtrain.spiking.neuron import Sites, from_int8, to_int8


class SoftmaxAttention(Mixer):
    """Grouped-query attention with RoPE, optional q/k norms before it, and an optional window."""

    def __init__(
        self,
        config: mcore.TransformerConfig,
        *,
        model: ModelConfig,
        groups,
        sp_algorithm: SequenceAlgorithm,
        sites: Sites,
        window: int | None,
        own_projections: bool = True,
    ):
        super().__init__(config, model=model, groups=groups, sites=sites, own_projections=own_projections)
        self.window, self.sp_group = window, groups.cp
        heads = dict(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        self.mix = mixing("F" if window is None else "S", sp_algorithm, **heads, window=window, group=groups.cp)
        self.q_norm = self._head_norm(model, groups.tp) if model.qk_norm else None
        self.k_norm = self._head_norm(model, groups.tp) if model.qk_norm else None
        self.rotary = Rotary(model)
        self.spiked_queries = None if window is None else sites.queries()
        self.rounding = None if window is None else sites.key_value_rounding()

    def _head_norm(self, model: ModelConfig, tp_group) -> RMSNorm:
        return RMSNorm(
            model.head_dim,
            eps=model.norm_eps,
            dtype=self.config.params_dtype,
            device=torch.cuda.current_device(),
            over_heads=lambda weight: mcore.copy_to_tensor_model_parallel_region(weight, group=tp_group),
        )

    def core(self, gate_x: Tensor, qkv: Tensor, documents: Documents, cache: LayerCache | None) -> Tensor:
        """See Mixer.core."""
        q, k, v = split_qkv(qkv, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary(q, k, documents.positions)
        q = q if self.spiked_queries is None else self.spiked_queries(q)
        if documents.num_meta:
            o = self._attend_with_meta(cache, q, *self._rounded(k, v), documents)
        elif cache is None:
            o = self.mix(q, *self._rounded(k, v), cu_seqlens=documents.cu_seqlens)
        elif documents.keepers is not None:
            o = self._attend_over_shards(cache, q, k, v, documents)
        else:
            o = self._attend_with(cache, q, k, v)
        return o.reshape(o.shape[1], 1, -1)

    def _rounded(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (k, v) if self.rounding is None else (self.rounding(k), self.rounding(v))

    def _to_store(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What caches keep of keys and values: them, or INT8 and scales where nothing else is computed with."""
        if self.rounding is None or self.rounding.share < 1:
            return self._rounded(k, v)
        (k, k_scale), (v, v_scale) = to_int8(k), to_int8(v)
        return k, v, k_scale, v_scale

    def _to_read(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v, *scales = stored
        return tuple(from_int8(x, scale, dtype=dtype) for x, scale in zip((k, v), scales)) if scales else (k, v)

    def _attend_with_meta(
        self, cache: LayerCache | None, q: Tensor, k: Tensor, v: Tensor, documents: Documents
    ) -> Tensor:
        (meta_q, meta_k, meta_v), (q, k, v) = split_meta(documents, q, k, v)
        o = _see_all(meta_q, [meta_k], [meta_v])
        if cache is not None:
            cache.sinks = {"sink_k": meta_k[0], "sink_v": meta_v[0]}
            return o
        others = self.mix(q, k, v, cu_seqlens=documents.cu_seqlens, sink_k=meta_k[0], sink_v=meta_v[0])
        return torch.cat([o, others], dim=1)

    def _attend_over_shards(self, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        kept = None if self.window is None else self.window - 1
        stored = self._to_store(k, v)
        cache.store([tail(x, kept, keepers=documents.keepers, group=self.sp_group) for x in stored])
        return self.mix(q, *self._to_read(stored, q.dtype), cu_seqlens=documents.cu_seqlens, **cache.sinks)

    def _attend_with(self, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stored = self._to_store(k, v)
        if cache.key is not None:
            stored = tuple(torch.cat(parts, dim=1) for parts in zip(cache.stored, stored))
        k, v = self._to_read(stored, q.dtype)
        kept = k.shape[1] if self.window is None else min(self.window - 1, k.shape[1])
        cache.store([x[:, x.shape[1] - kept :] for x in stored])
        if q.shape[1] == 1:
            keys, values = ([sinks[None]] for sinks in cache.sinks.values()) if cache.sinks else ([], [])
            return _see_all(q, [*keys, k], [*values, v])
        # views would keep the whole chunk alive, q/k/v projection included
        cache.store([x.clone() for x in cache.stored])
        return ops.attention(q, k, v, window=self.window, **cache.sinks)


def _see_all(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Every query against every given key, for a few queries: softmax in fp32.

    q [1,Q,Hq,D], keys and values [1,t,Hkv,D] in parts -> [1,Q,Hq,D].
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(2, (keys[0].shape[2], -1)).to(exact) * q.shape[-1] ** -0.5
    scores = [torch.einsum("bqhgd,bthd->bhgqt", grouped, k.to(exact)) for k in keys]
    weights = (scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)).softmax(-1)
    parts = weights.split([k.shape[1] for k in keys], dim=-1)
    outputs = [torch.einsum("bhgqt,bthd->bqhgd", part, v.to(exact)) for part, v in zip(parts, values)]
    return reduce(torch.add, outputs).to(q.dtype).flatten(2, 3)
