"""What a decoder layer remembers between calls: a recurrent state, or the keys and values it may still look at.

Memory is constant in the length for L (one state) and S (window - 1 keys), and grows for F.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerCache:
    """state: fp32 [1,Hkv,K,V] of L layers. key, value: [1,t,Hkv,D] after RoPE of S and F layers.

    key_scale, value_scale: fp32 [1,t,Hkv,1] where key and value are INT8, see sbtrain.spiking.neuron.to_int8.
    sinks: sink_k and sink_v [num_meta,Hkv,D] after RoPE of S and F layers, the meta tokens'; empty without them. The
    state of the meta tokens is where state begins.
    """

    state: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    sinks: dict[str, Tensor] = field(default_factory=dict)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """Key and value, and their scales if they have some; () before the first token."""
        tensors = self.key, self.value, self.key_scale, self.value_scale
        return tuple(tensor for tensor in tensors if tensor is not None)

    def store(self, tensors: Sequence[Tensor]) -> None:
        """Take over tensors as `stored` gives them."""
        self.key, self.value, *scales = tensors
        self.key_scale, self.value_scale = scales or (None, None)


@dataclass
class Cache:
    """The caches of all layers by 0-based index, and how many tokens they have seen."""

    layers: dict[int, LayerCache] = field(default_factory=dict)
    num_tokens: int = 0

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer, created on first use."""
        return self.layers.setdefault(index, LayerCache())
