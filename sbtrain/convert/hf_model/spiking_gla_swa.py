"""Spikes in place of activations, and INT8 weights: what config.spiking says, in plain torch.

config.spiking is None, or {k, layer_k, spike_down_proj, skip, queries, kv_int8, weight_group, int8_weights}: k spikes
of a mean activation, layers with another k by index, the layers of each projection that are left out. Projections: qkv,
gate (of linear attention), proj (behind attention), gate_up and down (of the FFN). Gradients pass straight through.
"""

import torch
import torch.nn.functional as F
from torch import nn


def straight(x, seen):
    """seen, with the gradient of x: rounding has none, and training would stand still without a word."""
    return seen.detach() + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else seen


def spikes(x, k):
    """x [..., D] as counts times a threshold of each token, mean|x| / k; counts round half to even. The dtype stays."""
    threshold = (x.abs().mean(-1, keepdim=True).float() / k).clamp(1e-5, 1e4)
    return straight(x, ((x.float() / threshold).round() * threshold).to(x.dtype))


def int8_tokens(x):
    """x [..., D] as INT8 times a scale of each vector, max|x| / 127. The dtype stays."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return straight(x, ((wide / scale).round().clamp(-128, 127) * scale).to(x.dtype))


class WeightQuantizer(nn.Module):
    """Scales [out, in / group, 1] of INT8 weights, fp32 in every precision; 1 where a projection is left out."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("scales", torch.ones(shape, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        moved = fn(self.scales)  # a rounded scale would change every integer
        fresh = moved.is_meta or self.scales.is_meta  # then there is nothing to keep
        self.scales = moved.float() if fresh else self.scales.to(moved.device)
        return self

    def forward(self, weight):
        """weight [out, in] -> the nearest integers times the scales; what is that already stays as it is."""
        wide, scales = weight.float().unflatten(1, (self.scales.shape[1], -1)), self.scales.float()
        return straight(weight, ((wide / scales).round() * scales).flatten(1).to(weight.dtype))


class SpikingLinear(nn.Linear):
    """A linear layer on spikes. k: None leaves it plain. group: input channels that share a scale; None: float."""

    def __init__(self, inputs, outputs, bias, *, k, group):
        super().__init__(inputs, outputs, bias=bias)
        self.k = k
        if group:
            self.weight_quantizer = WeightQuantizer((outputs, inputs // group if inputs % group == 0 else 1, 1))

    def forward(self, x):
        """x [..., in] -> [..., out]."""
        if self.k is None:
            return super().forward(x)
        weight = self.weight_quantizer(self.weight) if hasattr(self, "weight_quantizer") else self.weight
        return F.linear(spikes(x, self.k), weight, self.bias)


def linear(config, layer, projection, inputs, outputs, bias=False):
    """The linear layer of a projection, which spikes where config.spiking says so."""
    spiking = config.spiking
    if not spiking:
        return nn.Linear(inputs, outputs, bias=bias)
    plain = layer in spiking["skip"].get(projection, []) or (projection == "down" and not spiking["spike_down_proj"])
    k = None if plain else spiking["layer_k"].get(str(layer), spiking["k"])
    return SpikingLinear(inputs, outputs, bias, k=k, group=spiking["weight_group"] if spiking["int8_weights"] else None)


def replace_heads(config, layer, q, k, v):
    """Queries, keys and values of sliding windows behind RoPE, [..., K], as spikes and INT8 if the model has that."""
    spiking = config.spiking
    if spiking and spiking["queries"]:
        q = spikes(q, spiking["layer_k"].get(str(layer), spiking["k"]))
    if spiking and spiking["kv_int8"]:
        k, v = int8_tokens(k), int8_tokens(v)
    return q, k, v
