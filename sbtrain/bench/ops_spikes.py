"""The spiking ops at the shapes of a model; see ops_shapes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sbtrain.bench import ops_peers
from sbtrain.bench.ops_case import Case, Draw, Inputs
from sbtrain.config.schema import ModelConfig

NUM_SPIKE_STEPS = 8
INT8_GROUP = 128
"""Input channels that share a scale, as in the released W8ASpike model."""


def spike_cases(model: ModelConfig) -> list[Case]:
    """What spiked training and inference run. The backward pass of spike_values moves nothing: it is not timed."""
    hidden, ffn = model.hidden_size, model.ffn_size

    def activations(draw: Draw, num_tokens: int, *, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"x": draw.normal(num_tokens, *shape).detach()}

    def values_call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return (functions["spike_values"](x["x"]),)

    def encode_inputs(draw: Draw, num_tokens: int) -> dict[str, Tensor]:
        return {"count": draw.integers(-7, 8, num_tokens, hidden, dtype=torch.int32)}

    def encode_call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return (functions["spike_encode"](x["count"], encoding="bidirectional", num_steps=NUM_SPIKE_STEPS),)

    def decode_inputs(draw: Draw, num_tokens: int) -> dict[str, Tensor]:
        return {"spikes": draw.integers(-1, 2, NUM_SPIKE_STEPS, num_tokens, hidden).float()}

    def decode_call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return (functions["spike_decode"](x["spikes"], encoding="bidirectional"),)

    def linear_inputs(draw: Draw, num_tokens: int) -> dict[str, Tensor]:
        return {"x": draw.normal(num_tokens, hidden), "weight": draw.normal(ffn, hidden, scale=hidden**-0.5)}

    return [
        Case(
            "spike_count",
            "",
            partial(activations, shape=(hidden,)),
            lambda functions, x: tuple(functions["spike_count"](x["x"])),
            compared=False,
        ),
        *(
            Case("spike_count", f"values, {name}", partial(activations, shape=shape), values_call, compared=False)
            for name, shape in (
                ("hidden", (hidden,)),
                ("FFN", (ffn,)),
                ("query heads", (model.num_heads, model.head_dim)),
            )
        ),
        Case("spike_encode", f"{NUM_SPIKE_STEPS} steps", encode_inputs, encode_call, max_tokens=8192),
        Case("spike_encode", f"decode {NUM_SPIKE_STEPS} steps", decode_inputs, decode_call, max_tokens=8192),
        Case(
            "spike_linear",
            "",
            linear_inputs,
            lambda functions, x: (functions["spike_linear"](x["x"], x["weight"]),),
            flops=lambda num_tokens: 2.0 * num_tokens * hidden * ffn,
            compared=False,
        ),
        *_int8_products(model),
    ]


def _int8_products(model: ModelConfig) -> list[Case]:
    """spike_linear with INT8 weights at a layer's projections, beside a matmul of x's dtype."""
    hidden, ffn = model.hidden_size, model.ffn_size

    def inputs(draw: Draw, num_tokens: int, *, size: int, num_outputs: int, num_scales: int) -> dict[str, Tensor]:
        scale = draw.normal(num_outputs, num_scales, 1, scale=1e-3, mean=1e-2, dtype=torch.float32)
        return {
            "x": draw.normal(num_tokens, size).detach(),
            "weight": draw.integers(-127, 128, num_outputs, size, dtype=torch.int8),
            "weight_scale": scale.detach(),
        }

    def call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return (functions["spike_linear"](x["x"], x["weight"], weight_scale=x["weight_scale"]),)

    def case(name: str, size: int, num_outputs: int, num_scales: int) -> Case:
        return Case(
            "spike_linear",
            f"INT8 {name}",
            partial(inputs, size=size, num_outputs=num_outputs, num_scales=num_scales),
            call,
            flops=lambda num_tokens: 2.0 * num_tokens * size * num_outputs,
            peers=ops_peers.int8_linear_peers(),
            compared=False,
        )

    heads = model.num_heads * model.head_dim
    shapes = {
        "qkv": (hidden, heads + 2 * model.num_kv_heads * model.head_dim),
        "proj": (heads, hidden),
        "gate_up": (hidden, 2 * ffn),
        "down": (ffn, hidden),
    }
    return [
        case(name + suffix, size, num_outputs, 1 if suffix else size // min(INT8_GROUP, size & -size))
        for name, (size, num_outputs) in shapes.items()
        for suffix in ("", ", a scale a row")
    ]
