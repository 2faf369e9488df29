"""The models that benchmarks run: a recipe's shape at another depth and pattern, or a tiny one for CPUs."""

from __future__ import annotations

from dataclasses import replace

from sbtrain.config.load import load, recipe_names
from sbtrain.config.model_schema import GLAConfig, ModelConfig
from sbtrain.config.rules import check_pattern

TINY = ModelConfig(
    vocab_size=120,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=48,
    norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=1024,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    window=9,
    gla=GLAConfig(gate_rank=4),
    vocab_multiple=32,
)
"""model=tiny: runs in milliseconds anywhere, and its vocabulary needs padding."""


def model_config(name: str, *, num_layers: int, pattern: str) -> ModelConfig:
    """The shape of recipe `name` (`7b` is short for `7b_cpt`) or `tiny`, with this depth and pattern.

    Raises ValueError for an unknown name, a recipe that leaves its shape to a checkpoint, or a pattern that cannot be
    trained or does not fit the depth.
    """
    model = TINY if name == "tiny" else load([f"recipe={_recipe(name)}", "dry_run=true"]).model
    model = replace(model, num_layers=num_layers, pattern=pattern)
    check_pattern(model)
    return model


def _recipe(name: str) -> str:
    names = recipe_names()
    found = next((recipe for recipe in (name, f"{name}_cpt") if recipe in names), None)
    if found is None:
        raise ValueError(f"model={name} is not known; choose from: tiny, {', '.join(names)}")
    return found
