"""Rules of `model.spiking`."""

from __future__ import annotations

import difflib

from sbtrain.config.model_schema import Gate, ModelConfig
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.spiking_schema import EVERYWHERE, LARGEST_K, PROJECTIONS, layers_in


def check_spiking(model: ModelConfig) -> None:
    """model.spiking can be computed and names what exists, enabled or not. Raises ValueError naming key and fix."""
    spiking = model.spiking
    for key, k in {"k": spiking.k, **{f"layer_k.{layer}": k for layer, k in spiking.layer_k.items()}}.items():
        if not 0 < k <= LARGEST_K:
            raise ValueError(
                f"model.spiking.{key}={k} must be greater than 0 and at most {LARGEST_K:g}: it is the spikes of a mean "
                "activation"
            )
    for layer in spiking.layer_k:
        if not 0 <= layer < model.num_layers:
            raise ValueError(f"model.spiking.layer_k.{layer}: {_layers_of(model)}; remove it or name one of them")
    if spiking.warm_in_tokens < 0:
        raise ValueError(f"model.spiking.warm_in_tokens={spiking.warm_in_tokens} is negative; give 0 or more")
    if spiking.weight_group < 1:
        raise ValueError(f"model.spiking.weight_group={spiking.weight_group} must be 1 or more")
    for projection, where in spiking.skip.items():
        _check_skipped(model, projection, where)


def _check_skipped(model: ModelConfig, projection: str, where: str) -> None:
    key = f"model.spiking.skip.{projection}"
    if projection not in PROJECTIONS:
        nearest = difflib.get_close_matches(projection, PROJECTIONS, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(PROJECTIONS)}"
        raise ValueError(f"{key} is no projection; {advice}")
    if where == EVERYWHERE:
        _check_reached(model, projection, where)
        return
    try:
        parts = layers_in(where)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    last = max(part[-1] for part in parts)
    if last >= model.num_layers:
        raise ValueError(f"{key}='{where}' names layer {last}, {_layers_of(model)}; name those alone")
    _check_reached(model, projection, where)


def _check_reached(model: ModelConfig, projection: str, where: str) -> None:
    """Not every layer has a gate."""
    if projection != "gate":
        return
    kinds = parse_pattern(model.pattern, model.num_layers) if model.gla.gate is not Gate.tied else ()
    gated = [layer for layer, kind in enumerate(kinds) if "L" in kind.mixers]
    if any(model.spiking.skips(projection, layer) for layer in gated):
        return
    there = (
        f"layers {', '.join(map(str, gated))} have one; name some of them, or remove it"
        if gated
        else ("no layer of this model has one; remove it")
    )
    raise ValueError(f"model.spiking.skip.gate='{where}' leaves out no gate: {there}")


def _layers_of(model: ModelConfig) -> str:
    return f"the model's layers are 0 to {model.num_layers - 1}"
