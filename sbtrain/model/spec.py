"""THE TABLE: which module mixes tokens for each symbol of the layer pattern.

A new mixer is one file and one row here (and its FLOPs in flops.py). A pair of symbols is a pair of rows.
"""

from __future__ import annotations

from parallel import mcore
from parallel.layout import SequenceAlgorithms
from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.config.pattern import LayerKind
from sbtrain.config.schema import ModelConfig, Recompute
from sbtrain.model.gla import GatedLinearAttention
from sbtrain.model.mlp import GatedMLP
from sbtrain.model.pair import Pair
from sbtrain.model.softmax import SoftmaxAttention
from sbtrain.moe.layer import MoELayer
from sbtrain.spiking.neuron import Sites


def mixer_spec(
    symbol: str,
    *,
    model: ModelConfig,
    groups,
    sp_algorithm: SequenceAlgorithms,
    sites: Sites,
    own_projections: bool = True,
) -> mcore.ModuleSpec:
    """The module of one pattern symbol and its arguments. Raises ValueError for a symbol without a mixer."""
    table = {
        "F": (SoftmaxAttention, {"window": None}),
        "S": (SoftmaxAttention, {"window": model.window}),
        "L": (GatedLinearAttention, {}),
    }
    if symbol not in table:
        raise ValueError(f"model.pattern: no mixer for '{symbol}'; choose from {', '.join(table)}")
    module, params = table[symbol]
    shared = {"model": model, "groups": groups, "sp_algorithm": getattr(sp_algorithm, symbol), "sites": sites}
    return mcore.ModuleSpec(module, params={**shared, "own_projections": own_projections, **params})


def pair_spec(
    symbols: tuple[str, str], *, model: ModelConfig, groups, sp_algorithm: SequenceAlgorithms, sites: Sites
) -> mcore.ModuleSpec:
    """The module of two symbols that work in parallel and its arguments."""
    own = not model.pair.shared_projections
    about = dict(model=model, groups=groups, sites=sites)
    branches = {s: mixer_spec(s, sp_algorithm=sp_algorithm, own_projections=own, **about) for s in symbols}
    return mcore.ModuleSpec(Pair, params={**about, "branches": branches})


def ffn_spec(
    kind: LayerKind, *, model: ModelConfig, groups, recompute: Recompute, experts: ExpertsConfig, sites: Sites
) -> mcore.ModuleSpec:
    """The FFN of one layer and its arguments."""
    if kind.moe:
        params = {"model": model, "groups": groups, "recompute": recompute, "options": experts, "sites": sites}
        return mcore.ModuleSpec(MoELayer, params=params)
    return mcore.ModuleSpec(GatedMLP, params={"groups": groups, "recompute": recompute, "sites": sites})


def layer_modules(
    kind: LayerKind,
    config: mcore.TransformerConfig,
    *,
    model: ModelConfig,
    groups,
    sp_algorithm: SequenceAlgorithms,
    recompute: Recompute,
    experts: ExpertsConfig,
    sites: Sites,
):
    """Build (mixer, ffn) of one layer."""
    about = dict(model=model, groups=groups, sp_algorithm=sp_algorithm, sites=sites)
    spec = mixer_spec(kind.mixers[0], **about) if len(kind.mixers) == 1 else pair_spec(kind.mixers, **about)
    mixer = mcore.build_module(spec, config)
    ffn = ffn_spec(kind, model=model, groups=groups, recompute=recompute, experts=experts, sites=sites)
    return mixer, mcore.build_module(ffn, config)
