"""What spikes in a model, how much, and which weights are rounded with it: every key of `model.spiking`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Dict

PROJECTIONS = ("qkv", "gate", "proj", "gate_up", "down")
"""Names of projections by what they read: queries, keys, values and the gate of linear attention read the same."""
EVERYWHERE = "all"
LARGEST_K = 1e9
"""Counts have 32 bits: with more spikes of a mean activation they would say nothing."""


@dataclass(frozen=True)
class SpikingConfig:
    """Inputs of projections as integer spike counts times a threshold of each token (report, section 3.3).

    enabled: activations are replaced by counts times thresholds, the token's mean absolute value over k; gradients pass
        straight through. The output layer, embeddings, norms, routers and the state of linear attention stay as they
        are.
    k: spikes of a mean activation; more of them are more exact and less sparse.
    layer_k: layers with a k of their own, by their 0-based index.
    spike_down_proj: the down projection of FFNs spikes too (the report; the released code leaves it out).
    skip: what is neither spiked nor quantized: by projection (qkv, gate, proj, gate_up, down) the layers, such as
        "0-3,27" or "all". qkv and gate are inputs of a mixer's projections, proj of its output projection, gate_up and
        down of an FFN's and of experts'.
    queries: queries of S layers spike too, behind RoPE, with a threshold of each token and head.
    kv_int8: keys and values of S layers, behind RoPE, are rounded to INT8 with a scale of each token and head, and
        decoding keeps them so.
    warm_in_tokens: the replaced share of an activation rises from 0 to 1 over so many tokens of training; 0 replaces
        all from the start.
    weight_group: input channels that share a scale where weights are quantized to INT8 (launch/calibrate.py).
    """

    enabled: bool = False
    k: float = 3.0
    layer_k: Dict[int, float] = field(default_factory=dict)
    spike_down_proj: bool = False
    skip: Dict[str, str] = field(default_factory=dict)
    queries: bool = True
    kv_int8: bool = True
    warm_in_tokens: int = 0
    weight_group: int = 128

    def k_of(self, layer: int) -> float:
        """k of a layer."""
        return self.layer_k.get(layer, self.k)

    def skips(self, projection: str, layer: int) -> bool:
        """Whether the table leaves a projection of a layer out."""
        where = self.skip.get(projection)
        return where is not None and (where == EVERYWHERE or any(layer in part for part in layers_in(where)))

    def spikes(self, projection: str, layer: int) -> bool:
        """Whether the input of a projection spikes."""
        return self.enabled and not self.skips(projection, layer) and (projection != "down" or self.spike_down_proj)

    def in_training(self) -> dict:
        """The keys that change what training computes, with their values."""
        if not self.enabled:
            return {"enabled": False}
        return {key: value for key, value in asdict(self).items() if key != "weight_group"}

    def share_after(self, tokens: int) -> float:
        """The replaced share, 0 to 1, of what is computed when so many tokens have been trained on."""
        return min(1.0, tokens / self.warm_in_tokens) if self.warm_in_tokens else 1.0


def layers_in(text: str) -> list[range]:
    """The layers of a list such as "0-3,27". Raises ValueError, without the key, for another text."""
    found = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(
                f"'{part.strip()}' is no layer and no range of layers; write for example '0-3,27' or 'all'"
            )
        layers = range(int(first), int(last if dash else first) + 1)
        if not layers:
            raise ValueError(f"{part.strip()} runs backward; write the smaller layer first")
        found.append(layers)
    return found
