"""Rotary embeddings of queries and keys, with Llama-3 scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ops
from sbtrain.config.model_schema import ModelConfig, RopeScaling


class Rotary:
    """Rotates queries and keys by their positions."""

    def __init__(self, model: ModelConfig):
        self._inv_freq = inverse_frequencies(model)

    def __call__(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q [1,T,Hq,D], k [1,T,Hkv,D], positions int64 [T] -> q and k, rotated."""
        with torch.inference_mode(False):  # a later call may train
            self._inv_freq = self._inv_freq.to(q.device)
        return ops.rope_qk(q, k, positions[None], self._inv_freq)


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """fp32 [head_dim/2] on the CPU: theta^(-2i/head_dim), rescaled by model.rope_scaling where it is given."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64, device="cpu") / model.head_dim
    frequencies = (1.0 / model.rope_theta**exponents).float()
    return frequencies if model.rope_scaling is None else _scaled(frequencies, model.rope_scaling)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama-3 scaling: long wavelengths divided by factor, short ones kept, a linear blend between (Llama 3.1)."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
