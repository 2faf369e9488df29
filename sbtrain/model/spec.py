"""THE TABLE: which module mixes tokens for each symbol of the layer pattern.

A new mixer is one file and one row here (and its FLOPs in flops.py).
"""

from __future__ import annotations

from parallel import mcore
from parallel.layout import SequenceAlgorithms
from sbtrain.config.pattern import LayerKind
from sbtrain.config.schema import ModelConfig
from sbtrain.model.gla import GatedLinearAttention
from sbtrain.model.mlp import GatedMLP
from sbtrain.model.softmax import SoftmaxAttention


def mixer_spec(symbol: str, *, model: ModelConfig, groups, sp_algorithm: SequenceAlgorithms) -> mcore.ModuleSpec:
    """The module of one pattern symbol and its arguments. Raises ValueError for a symbol without a mixer."""
    table = {
        "F": (SoftmaxAttention, {"window": None}),
        "S": (SoftmaxAttention, {"window": model.window}),
        "L": (GatedLinearAttention, {}),
    }
    if symbol not in table:
        raise ValueError(f"model.pattern: no mixer for '{symbol}'; choose from {', '.join(table)}")
    module, params = table[symbol]
    shared = {"model": model, "groups": groups, "sp_algorithm": getattr(sp_algorithm, symbol)}
    return mcore.ModuleSpec(module, params={**shared, **params})


def layer_modules(
    kind: LayerKind, config: mcore.TransformerConfig, *, model: ModelConfig, groups, sp_algorithm: SequenceAlgorithms
):
    """Build (mixer, ffn) of one layer."""
    (symbol,) = kind.mixers
    mixer = mcore.build_module(mixer_spec(symbol, model=model, groups=groups, sp_algorithm=sp_algorithm), config)
    ffn = mcore.build_module(mcore.ModuleSpec(GatedMLP, params={"groups": groups}), config)
    return mixer, ffn
