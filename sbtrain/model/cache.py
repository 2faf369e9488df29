"""What a decoder layer remembers between calls: a recurrent state, or the keys and values it may still look at.

Memory is constant in the length for L (one state) and S (window - 1 keys), and grows for F.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerCache:
    """state: fp32 [1,Hkv,K,V] of L layers. key, value: [1,t,Hkv,D] after RoPE of S and F layers.

    sinks: sink_k and sink_v [num_meta,Hkv,D] after RoPE of S and F layers, the meta tokens'; empty without them. The
    state of the meta tokens is where state begins.
    """

    state: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    sinks: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Cache:
    """The caches of all layers by 0-based index, and how many tokens they have seen."""

    layers: dict[int, LayerCache] = field(default_factory=dict)
    num_tokens: int = 0

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer, created on first use."""
        return self.layers.setdefault(index, LayerCache())
