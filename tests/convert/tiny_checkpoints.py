"""Tiny random checkpoints of the source families, saved by transformers, and what the tests need around them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sbtrain.config.hf_shape import read_shape
from sbtrain.config.schema import ModelConfig
from sbtrain.convert.mapping import Part
from sbtrain.convert.start import fill
from sbtrain.convert.weights import table

_EVEN = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 72}
_ODD = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 42}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {**_EVEN, "vocab_size": 131, "tie_word_embeddings": False}),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {**_ODD, "vocab_size": 128, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**_EVEN, "vocab_size": 99, "head_dim": 8, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {**_ODD, "vocab_size": 77, "tie_word_embeddings": False}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {**_ODD, "vocab_size": 77, "rope_parameters": _LLAMA3}),
}


def save_tiny(folder: Path, family: str, *, dtype=torch.float32, num_layers: int = 4, shard: str = "5GB"):
    """Save a random model of the family into folder; returns the transformers model."""
    config_class, model_class, shape = FAMILIES[family]
    torch.manual_seed(7)
    teacher = model_class(config_class(**shape, num_hidden_layers=num_layers)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    teacher.save_pretrained(folder, max_shard_size=shard)
    return teacher


def model_of(folder: Path, *, pattern: str = "LS", window: int = 9, vocab_multiple: int = 24) -> ModelConfig:
    """The configuration of a converted model; the padded vocabulary divides by 2 and 3."""
    return ModelConfig(pattern=pattern, window=window, vocab_multiple=vocab_multiple, **read_shape(folder))


def filled(model: ModelConfig, path: str, *, tp_rank: int = 0, tp: int = 1, seed: int = 0, dtype=torch.float32):
    """All parameters of one tensor-parallel rank, filled; what fill misses stays NaN."""
    local = {row.name: torch.full(row.local_shape(Part(tp=tp)), float("nan"), dtype=dtype) for row in table(model)}
    fill(local, model=model, path=path, seed=seed, tp_rank=tp_rank, tp=tp)
    return local


class DictReader:
    """A training checkpoint in memory."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def get(self, name: str) -> Tensor:
        """The global tensor."""
        return self.state[name]
