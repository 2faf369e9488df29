"""int8=true: the projections that spike multiply counts and the INT8 weights of the calibration, as integers.

The integers and scales are those that calibration has written, or that a W8ASpike folder holds; nothing is rounded
here. They take the place of float weights, of which no copy stays. What the calibration leaves out is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ops.spike_linear import GROUP_UNIT
from sbtrain.config.model_schema import ModelConfig
from sbtrain.convert.names import projection_of
from sbtrain.model.build import global_parameters
from sbtrain.model.hybrid import HybridModel
from sbtrain.spiking.linear import Int8Projection
from sbtrain.spiking.neuron import Neuron


class Int8Weights(Protocol):
    """The tensors of an INT8 model by our global names. int8_names: of weights that are integers times scales."""

    int8_names: frozenset[str]

    def get(self, name: str) -> Tensor: ...

    def pair(self, name: str) -> tuple[Tensor, Tensor]: ...


def check_groups(model: ModelConfig, origin: Path) -> None:
    """Raise ValueError where integers of this model's groups cannot be multiplied."""
    group = model.spiking.weight_group
    if group % GROUP_UNIT:
        raise ValueError(
            f"int8=true: the INT8 weights of {origin} are in groups of {group} channels, integers are multiplied by "
            f"groups of a multiple of {GROUP_UNIT}; calibrate with such a weight_group=, or leave out int8="
        )


def swap(model: HybridModel, names: Iterable[str]) -> dict[str, Int8Projection]:
    """Replace the projections of the weights `names`, and the neurons before them. By name, uninitialized.

    model: of one tp rank, with a k for each layer in its model_config. Its float weights of these names are given back
    to the device before INT8 ones are allocated.
    """
    taken = {name: _take_out(model, name) for name in names}
    torch.cuda.empty_cache()
    spiking, projections = model.model_config.spiking, {}
    for name, (parent, leaf, shape, bias) in taken.items():
        k, device = spiking.k_of(projection_of(name)[1]), torch.cuda.current_device()
        projections[name] = Int8Projection(shape, group=spiking.weight_group, k=k, bias=bias, device=device)
        setattr(parent, leaf, projections[name])
    _take_out_neurons(model, {projection_of(name) for name in projections})
    return projections


def _take_out(model: nn.Module, name: str) -> tuple[nn.Module, str, tuple[int, int], nn.Parameter | None]:
    """Where the projection of a weight is, (parent, child), its shape and bias. It is there no longer."""
    path, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(path)
    projection = getattr(parent, leaf)
    setattr(parent, leaf, None)
    return parent, leaf, tuple(projection.weight.shape), projection.bias


def _take_out_neurons(model: nn.Module, sites: set[tuple[str, int]]) -> None:
    """Those before swapped projections, which count by themselves; of queries they stay."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Neuron) and (child.site, child.layer) in sites:
                setattr(module, name, None)


@torch.no_grad()
def fill_int8(model: HybridModel, projections: dict[str, Int8Projection], weights: Int8Weights) -> None:
    """Every weight, tensor by tensor. projections: of `swap`. Raises ValueError, one line, as weights do."""
    for name, parameter in global_parameters(model).items():
        tensor = weights.get(name)
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, the model needs {list(parameter.shape)}; calibrate or export again"
            )
        parameter.copy_(tensor)
    for name, projection in projections.items():
        integers, scales = weights.pair(name)
        projection.weight.copy_(integers)
        projection.weight_scale.copy_(scales)
