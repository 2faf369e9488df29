"""Neurons: what is computed from spikes in place of an activation; and INT8 keys and values. No parameters.

A neuron replaces x by count * threshold, the threshold of each token mean|x| / k (ops.spike_values; SpikingBrain
report, section 3.3.1; in training its gradient passes straight through). Where ranks of tensor parallelism hold the
channels of a token, the mean is taken over all of them, so counts are those of one rank; in fp32 the sum over ranks may
differ from one rank's in its last bit, and then a count whose quotient lies next to a half may differ by one.

While training warms in, x + share * (replaced - x) is computed; with a share of 0 the model is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ops
from parallel.place import primitive
from parallel.recompute import is_replay
from sbtrain.config.spiking_schema import SpikingConfig


class Replacement(nn.Module):
    """What replaces an activation by a rounded one. share: how much of it, 0 to 1."""

    def __init__(self):
        super().__init__()
        self.share = 1.0

    def blended(self, x: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        """x + share * (replace(x) - x), in x's dtype; its gradient is x's."""
        if self.share == 0:
            return x
        return replace(x) if self.share == 1 else _Blend.apply(x, replace, self.share)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """What megatron asks of every part: there is nothing to save."""
        return {}


class _Blend(torch.autograd.Function):
    """Part of the way from x to replace(x); the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x: Tensor, replace: Callable[[Tensor], Tensor], share: float) -> Tensor:
        return torch.lerp(x, replace(x), share)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, None


class Neuron(Replacement):
    """The neuron before one projection of one layer. site: the projection, see SpikingConfig.skip, or "queries".

    observer: called with the neuron, each input in full precision, its mean_abs and the rows that count as `spike`
    takes them, while it is set; recomputed passes call it once.
    """

    def __init__(self, *, k: float, site: str, layer: int, tp_group=None):
        """tp_group: whose ranks hold parts of a token's channels; None where x has all of them."""
        super().__init__()
        self.k, self.site, self.layer, self._tp_group = k, site, layer, tp_group
        self.observer: Optional[Callable[[Neuron, Tensor, Optional[Tensor], Optional[Tensor]], Any]] = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape and dtype."""
        return self.spike(x, self.mean_abs(x))

    def spike(self, x: Tensor, mean_abs: Tensor | None, counted: Tensor | None = None) -> Tensor:
        """The same with what mean_abs has given. counted: index of the rows that observers count, None is all."""
        if self.observer is not None and not is_replay():
            self.observer(self, x, mean_abs, counted)
        return self.values(x, mean_abs)

    def values(self, x: Tensor, mean_abs: Tensor | None) -> Tensor:
        """The same, unobserved and without ranks of tp meeting: for a backward pass that makes x again."""
        return self.blended(x, lambda x: ops.spike_values(x, k=self.k, mean_abs=mean_abs))

    @torch.no_grad()
    def mean_abs(self, x: Tensor) -> Tensor | None:
        """fp32 or fp64 [..., 1], the mean of |x| over all channels of a token; None where x has them all.

        Collective over tp_group, unless nothing is replaced.
        """
        if self._tp_group is None or self._tp_group.size() == 1 or (self.share == 0 and self.observer is None):
            return None
        exact = torch.promote_types(x.dtype, torch.float32)
        total = torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True, dtype=exact)
        with primitive("mean activation"):
            dist.all_reduce(total, group=self._tp_group)
        return total / (x.shape[-1] * self._tp_group.size())

    def extra_repr(self) -> str:
        """As torch prints it."""
        return f"{self.site} of layer {self.layer}, k={self.k:g}"


class KeyValueRounding(Replacement):
    """Keys or values as INT8 times a scale of each token and head."""

    def forward(self, x: Tensor) -> Tensor:
        """x [1,T,H,D] -> the same shape and dtype; the gradient passes straight through."""
        return self.blended(x, _Rounded.apply)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return from_int8(*to_int8(x), dtype=x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> int8 of its shape and scale [..., 1], fp32 or fp64: max|x| / 127 (released W8ASpike code)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(exact)
    scale = wide.abs().amax(-1, keepdim=True) / 127
    # a vector of zeros has no scale; any would do
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (wide / scale).round().clamp(-128, 127).to(torch.int8), scale


def from_int8(count: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """What to_int8 stands for."""
    return (count * scale).to(dtype)


@dataclass(frozen=True)
class Sites:
    """Where one layer spikes. tp_group: the ranks that row-parallel projections are cut over."""

    spiking: SpikingConfig
    layer: int
    tp_group: Any

    def neuron(self, projection: str, *, cut: bool = False) -> Neuron | None:
        """A new neuron before a projection, None where it does not spike. cut: tp ranks hold parts of its input."""
        if not self.spiking.spikes(projection, self.layer):
            return None
        return self._neuron(projection, self.tp_group if cut else None)

    def queries(self) -> Neuron | None:
        """The neuron of a sliding-window layer's queries."""
        return self._neuron("queries", None) if self.spiking.enabled and self.spiking.queries else None

    def key_value_rounding(self) -> KeyValueRounding | None:
        """The rounding of a sliding-window layer's keys and values."""
        return KeyValueRounding() if self.spiking.enabled and self.spiking.kv_int8 else None

    def _neuron(self, site: str, tp_group) -> Neuron:
        return Neuron(k=self.spiking.k_of(self.layer), site=site, layer=self.layer, tp_group=tp_group)


class SpikedInput(nn.Module):
    """A mixer's input as its q, k, v projection reads it, and as the gate of linear attention reads it."""

    def __init__(self, sites: Sites, *, gated: bool):
        """gated: the layer has a gate with a projection of its own."""
        super().__init__()
        self.qkv = sites.neuron("qkv")
        self.gate = sites.neuron("gate") if gated and self.qkv is None else None
        self.gate_reads_qkv = self.qkv is not None and sites.spiking.spikes("gate", sites.layer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T,1,D] -> (for q, k, v; for the gate), one tensor where both read the same."""
        qkv = x if self.qkv is None else self.qkv(x)
        if self.gate_reads_qkv:
            return qkv, qkv
        return qkv, x if self.gate is None else self.gate(x)


def activated(
    gate_up: Tensor, neuron: Neuron | None, counted: Tensor | None = None
) -> tuple[Tensor, Callable[[], Tensor]]:
    """What a down projection reads of gate and up, [..., 2F] -> [..., F], and a function that makes it again.

    neuron: that of the down projection, None where it does not spike. counted: as `Neuron.spike` takes it.
    """

    def make() -> Tensor:
        return ops.swiglu(gate_up)

    if neuron is None:
        return make(), make
    x = make()
    mean_abs = neuron.mean_abs(x)
    return neuron.spike(x, mean_abs, counted), lambda: neuron.values(make(), mean_abs)


def neurons(model: nn.Module) -> list[Neuron]:
    """All neurons of a model, or of a part of it, in the order of its modules. Empty where it does not spike."""
    return [module for module in model.modules() if isinstance(module, Neuron)]


def set_share(model: nn.Module, share: float) -> None:
    """Replace this share, 0 to 1, of all that a model replaces."""
    for part in _replacements(model):
        part.share = share


@contextmanager
def without_spikes(models: Iterable[nn.Module]) -> Iterator[None]:
    """Context: the models compute what they would without spikes and INT8."""
    before = [(part, part.share) for model in models for part in _replacements(model)]
    for part, _ in before:
        part.share = 0.0
    try:
        yield
    finally:
        for part, share in before:
            part.share = share


def _replacements(model: nn.Module) -> list[Replacement]:
    return [module for module in model.modules() if isinstance(module, Replacement)]
