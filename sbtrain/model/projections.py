"""The fused q, k, v projection and the output projection that all mixers share, sharded by kv head over tp."""

from __future__ import annotations

from torch import Tensor

from parallel import mcore


def linear_qkv(config: mcore.TransformerConfig, tp_group) -> mcore.ColumnParallelLinear:
    """Column-parallel projection to q, k, v, group-major: the G query heads of a kv head, its key, its value."""
    rows = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
    return mcore.ColumnParallelLinear(
        config.hidden_size,
        rows,
        config=config,
        init_method=config.init_method,
        bias=config.add_qkv_bias,
        gather_output=False,
        tp_group=tp_group,
    )


def linear_proj(config: mcore.TransformerConfig, tp_group) -> mcore.RowParallelLinear:
    """Row-parallel output projection, without bias."""
    return mcore.RowParallelLinear(
        config.num_attention_heads * config.kv_channels,
        config.hidden_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=tp_group,
    )


def split_qkv(qkv: Tensor, *, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T,1,Hkv·(G+2)·D] -> q [1,T,Hkv·G,D], k and v [1,T,Hkv,D]."""
    qkv = qkv.view(1, qkv.shape[0], num_kv_heads, -1, head_dim)
    # one split: the gradients of three slices would each be padded to the size of qkv and then added
    q, k, v = qkv.split([qkv.shape[3] - 2, 1, 1], dim=3)
    return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
