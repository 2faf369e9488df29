"""What becomes of a layer's attention: the parameters each kind of mixer inherits, drops and adds.

F, S  inherit everything, q/k norms included (the window is no parameter)
L     inherits q, k, v and the output projection; drops q/k norms; adds the output norm and, unless its gate is tied to
      the key, the gate (SpikingBrain report section 3.1; released initialization: xavier_uniform, gain 2^-2.5)
pair  each of its two mixers inherits a copy of all that, or both share one; adds a norm of each mixer's output
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbtrain.config.model_schema import Gate, ModelConfig
from sbtrain.config.pattern import LayerKind
from sbtrain.convert.mapping import QKV, Direct, Fill, Mapping, Source

GATE_GAIN = 2**-2.5
BRANCH = {"L": "la_", "S": "swa_", "F": "fa_"}
"""What the tensors of a pair's mixers begin with in our exports; the source family's have no prefix."""
MERGE_NORMS = ".merge_norms."


def mixer_rows(layer: int, kind: LayerKind, model: ModelConfig, *, from_teacher: bool = True) -> list[Mapping]:
    """Mappings of the mixers of one layer. from_teacher: both mixers of a pair read the source family's attention."""
    ours, theirs = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}.self_attn"
    if len(kind.mixers) == 1:
        return _projections(ours, f"{theirs}.", model) + _extras(ours, theirs, kind.mixers[0], model, prefix="")
    shared, rows = model.pair.shared_projections, []
    if shared:
        rows += _projections(ours, f"{theirs}.", model)
    for symbol in kind.mixers:
        prefix, branch = "" if from_teacher else BRANCH[symbol], f"{ours}.branches.{symbol}"
        if not shared:
            rows += _projections(branch, f"{theirs}.{prefix}", model)
        rows += _extras(branch, theirs, symbol, model, prefix=prefix)
    return rows + [_merge_norm(ours, theirs, symbol, model) for symbol in kind.mixers]


def _projections(ours: str, theirs: str, model: ModelConfig) -> list[Mapping]:
    """q, k, v and output projections. theirs: what comes before `q_proj`."""
    q_rows, kv_rows = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden = model.hidden_size
    split = {"group": model.num_heads // model.num_kv_heads, "head_dim": model.head_dim}

    def qkv(leaf: str, tail: tuple[int, ...], fill: Fill) -> Mapping:
        rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        sources = tuple(Source(f"{theirs}{x}_proj.{leaf}", (rows[x], *tail)) for x in rows)
        return QKV(f"{ours}.linear_qkv.{leaf}", (q_rows + 2 * kv_rows, *tail), sources, 0, fill, **split)

    rows = [qkv("weight", (hidden,), Fill.matrix)]
    if model.qkv_bias:
        rows.append(qkv("bias", (), Fill.bias))
    output = Source(f"{theirs}o_proj.weight", (hidden, q_rows))
    return [*rows, Direct(f"{ours}.linear_proj.weight", output.shape, (output,), 1)]


def _extras(ours: str, theirs: str, symbol: str, model: ModelConfig, *, prefix: str) -> list[Mapping]:
    """What a mixer has besides its projections: gate and output norm, or q/k norms."""
    hidden, rank, kv_rows = model.hidden_size, model.gla.gate_rank, model.num_kv_heads * model.head_dim

    def own(name: str, source: str, shape: tuple[int, ...], **how) -> Mapping:
        return Direct(f"{ours}.{name}", shape, (Source(f"{theirs}.{source}", shape),), **how)

    norm = {"shape": (model.head_dim,), "fill": Fill.norm}
    if symbol != "L":
        return [own(f"{x}_norm.weight", f"{prefix}{x}_norm.weight", **norm) for x in "qk" if model.qk_norm]
    rows = []
    if model.gla.gate is Gate.low_rank:
        rows = [
            own("gate_down.weight", "gk_proj.0.weight", (rank, hidden), new=True),
            own("gate_up.weight", "gk_proj.1.weight", (kv_rows, rank), cut_dim=0, new=True),
            own("gate_up.bias", "gk_proj.1.bias", (kv_rows,), cut_dim=0, fill=Fill.bias, new=True),
        ]
    elif model.gla.gate is Gate.full_rank:
        rows = [
            own("gate.weight", "gk_proj.weight", (kv_rows, hidden), cut_dim=0, new=True),
            own("gate.bias", "gk_proj.bias", (kv_rows,), cut_dim=0, fill=Fill.bias, new=True),
        ]
    return [*rows, own("out_norm.weight", "g_norm.weight", **norm, new=True)]


def _merge_norm(ours: str, theirs: str, symbol: str, model: ModelConfig) -> Mapping:
    """Over all heads, cut with them, before the output projection; over the residual channels behind it."""
    before = model.pair.norms_before_projection
    source = Source(
        f"{theirs}.{BRANCH[symbol]}merge_norm.weight",
        (model.num_heads * model.head_dim if before else model.hidden_size,),
    )
    name, cut_dim = f"{ours}{MERGE_NORMS}{symbol}.weight", 0 if before else None
    return Direct(name, source.shape, (source,), cut_dim, Fill.norm, new=True)


def dropped(layer: int, kind: LayerKind, model: ModelConfig) -> list[str]:
    """Tensors of the source that a converted layer leaves behind on purpose."""
    if kind.mixers == ("L",) and model.qk_norm:
        return [f"model.layers.{layer}.self_attn.{x}_norm.weight" for x in "qk"]
    return []


def draw_new(mapping: Mapping, shape: tuple[int, ...], generator: torch.Generator, *, norm: float = 1.0) -> Tensor:
    """A parameter that conversion adds (of experts, one), unsharded, fp32, CPU: matrices normal or xavier, biases zero,
    norms `norm`.
    """
    if mapping.fill is Fill.norm:
        return torch.full(shape, norm)
    tensor = torch.zeros(shape)
    if mapping.fill is Fill.matrix and mapping.std is not None:
        tensor.normal_(0, mapping.std, generator=generator)
    elif mapping.fill is Fill.matrix:
        torch.nn.init.xavier_uniform_(tensor, gain=GATE_GAIN, generator=generator)
    return tensor
