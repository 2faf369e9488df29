"""`model.spiking` in the config.json of exports, and the released INT8 SpikingBrain-7B, whose config.json is silent.

The key `spiking` says what spikes, with layers as lists; int8_weights: every projection has weight_quantizer.scales.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbtrain.config.spiking_schema import LARGEST_K, PROJECTIONS, SpikingConfig

SCALES = ".weight_quantizer.scales"
"""What the name of a projection's scales ends with, in place of .weight."""
_FLAGS = ("spike_down_proj", "queries", "kv_int8")


def described(spiking: SpikingConfig, *, num_layers: int, int8_weights: bool) -> dict[str, Any]:
    """The value of `spiking` in the config.json of a model that spikes."""
    skipped = {name: [i for i in range(num_layers) if spiking.skips(name, i)] for name in PROJECTIONS}
    return {
        "k": spiking.k,
        "layer_k": {str(layer): k for layer, k in spiking.layer_k.items()},
        **{flag: getattr(spiking, flag) for flag in _FLAGS},
        "skip": {name: layers for name, layers in skipped.items() if layers},
        "weight_group": spiking.weight_group,
        "int8_weights": int8_weights,
    }


def spiking_of(values: dict[str, Any]) -> SpikingConfig:
    """The inverse, of a whole config.json. Raises ValueError, without the file, where the key is not as written."""
    given = values.get("spiking")
    if given is None:
        return SpikingConfig()
    num_layers, group = values["num_hidden_layers"], given["weight_group"]
    k_of = {"k": given["k"], **{f"layer_k.{layer}": k for layer, k in given["layer_k"].items()}}
    wrong = [
        f"spiking.{key} is {k!r}" for key, k in k_of.items() if type(k) not in (int, float) or not 0 < k <= LARGEST_K
    ]
    flags = (*_FLAGS, "int8_weights")
    wrong += [f"spiking.{flag} is {given[flag]!r}" for flag in flags if not isinstance(given[flag], bool)]
    if type(group) is not int or group < 1:
        wrong.append(f"spiking.weight_group is {group!r}")
    for name, layers in given["skip"].items():
        if name not in PROJECTIONS or not set(layers) <= set(range(num_layers)):
            wrong.append(f"spiking.skip.{name} is {layers!r}")
    if wrong:
        raise ValueError(wrong[0])
    return SpikingConfig(
        enabled=True,
        k=float(given["k"]),
        layer_k={int(layer): float(k) for layer, k in given["layer_k"].items()},
        skip={name: ",".join(map(str, layers)) for name, layers in given["skip"].items() if layers},
        weight_group=group,
        **{flag: given[flag] for flag in _FLAGS},
    )


def alike(ours: SpikingConfig, theirs: SpikingConfig, num_layers: int) -> SpikingConfig:
    """Ours, with what computes the same as theirs written as theirs is; warming in is training's."""
    if all(ours.k_of(i) == theirs.k_of(i) for i in range(num_layers)):
        ours = replace(ours, k=theirs.k, layer_k=theirs.layer_k)
    here, there = (replace(each, enabled=True) for each in (ours, theirs))
    if all(here.spikes(name, i) == there.spikes(name, i) for name in PROJECTIONS for i in range(num_layers)):
        ours = replace(ours, skip=theirs.skip, spike_down_proj=theirs.spike_down_proj)
    return replace(ours, warm_in_tokens=theirs.warm_in_tokens)


def with_released_spiking(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config.json with what it leaves unsaid in the released INT8 model, which only the tensors' names tell."""
    if values.get("model_type") != "gla_swa" or "spiking" in values:
        return values
    if not any(isinstance(name, str) and name.endswith(SCALES) for name in _tensor_names(folder)):
        return values
    spiking = described(SpikingConfig(enabled=True), num_layers=0, int8_weights=True)  # nothing is skipped
    return {**values, "spiking": spiking, "gate_full_rank": True}


def _tensor_names(folder: Path) -> list:
    """Names in a safetensors folder; none where it is damaged, which whoever reads tensors says."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        with open(single, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return list(json.loads(file.read(size))) if size <= single.stat().st_size else []
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return []
