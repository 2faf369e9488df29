"""What becomes of a layer's attention: the parameters each kind of mixer inherits, drops and adds.

F, S  inherit everything, q/k norms included (the window is no parameter)
L     inherits q, k, v and the output projection; drops q/k norms; adds the low-rank gate and the output norm
      (SpikingBrain report section 3.1; released initialization: xavier_uniform, gain 2^-2.5)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbtrain.config.schema import ModelConfig
from sbtrain.convert.mapping import QKV, Direct, Fill, Mapping, Source

GATE_GAIN = 2**-2.5


def mixer_rows(layer: int, symbol: str, model: ModelConfig) -> list[Mapping]:
    """Mappings of the mixer of one layer. symbol: F, S or L."""
    ours, theirs = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}.self_attn"
    q_rows, kv_rows = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden = model.hidden_size
    split = {"group": model.num_heads // model.num_kv_heads, "head_dim": model.head_dim}

    def qkv(leaf: str, tail: tuple[int, ...], fill: Fill) -> Mapping:
        rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        sources = tuple(Source(f"{theirs}.{x}_proj.{leaf}", (rows[x], *tail)) for x in rows)
        return QKV(f"{ours}.linear_qkv.{leaf}", (q_rows + 2 * kv_rows, *tail), sources, 0, fill, **split)

    def own(name: str, source: str, shape: tuple[int, ...], **kind) -> Mapping:
        return Direct(f"{ours}.{name}", shape, (Source(f"{theirs}.{source}", shape),), **kind)

    rows = [qkv("weight", (hidden,), Fill.matrix)]
    if model.qkv_bias:
        rows.append(qkv("bias", (), Fill.bias))
    rows.append(own("linear_proj.weight", "o_proj.weight", (hidden, q_rows), tp_dim=1))
    if symbol == "L":
        rank = model.gla.gate_rank
        rows += [
            own("gate_down.weight", "gk_proj.0.weight", (rank, hidden), new=True),
            own("gate_up.weight", "gk_proj.1.weight", (kv_rows, rank), tp_dim=0, new=True),
            own("gate_up.bias", "gk_proj.1.bias", (kv_rows,), tp_dim=0, fill=Fill.bias, new=True),
            own("out_norm.weight", "g_norm.weight", (model.head_dim,), fill=Fill.norm, new=True),
        ]
    elif model.qk_norm:
        rows += [own(f"{x}_norm.weight", f"{x}_norm.weight", (model.head_dim,), fill=Fill.norm) for x in "qk"]
    return rows


def dropped(layer: int, symbol: str, model: ModelConfig) -> list[str]:
    """Tensors of the source that a converted layer leaves behind on purpose."""
    if symbol == "L" and model.qk_norm:
        return [f"model.layers.{layer}.self_attn.{x}_norm.weight" for x in "qk"]
    return []


def draw_new(mapping: Mapping, generator: torch.Generator, *, out_norm: float = 1.0) -> Tensor:
    """A parameter that conversion adds, unsharded, fp32, CPU: gates xavier, biases zero, norms out_norm."""
    if mapping.fill is Fill.norm:
        return torch.full(mapping.shape, out_norm)
    tensor = torch.zeros(mapping.shape)
    if mapping.fill is Fill.matrix:
        torch.nn.init.xavier_uniform_(tensor, gain=GATE_GAIN, generator=generator)
    return tensor
