"""Every op at the shapes of a model: inputs, call, useful work, peers. One row of B = 1, bf16 unless told otherwise."""

from __future__ import annotations

from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sbtrain.bench import ops_peers
from sbtrain.bench.ops_case import Case, Draw, Inputs
from sbtrain.config.schema import ModelConfig

NUM_SINKS = 128
NUM_EXPERTS = 8
DELTA_HEADS, DELTA_VALUE_HEADS = 16, 32
"""Heads of q and k, and of v, for the gated delta rule's published figures."""
MOBA_CHUNK_TOKENS, MOBA_CHUNKS = 512, 4
"""SpikingBrain2.0, continued pretraining."""
NUM_SPIKE_STEPS = 8
INT8_GROUP = 128
"""Input channels that share a scale, as in the released W8ASpike model."""
EDGES = (0.0, 0.02, 0.11, 0.35, 0.36, 0.5, 0.78, 1.0)
"""Where the packed documents of a row begin and end, as parts of the row."""
FLASH_BACKWARD = 2.5
"""FLOPs of attention's backward pass over its forward pass: 5 products for 2, as in FlashAttention's figures."""


def cases(model: ModelConfig) -> list[Case]:
    """All cases, op by op."""
    return [
        *_gated_linear_attention(model),
        *_gated_delta_rule(model),
        *_softmax_attention(model),
        *_moba(model),
        *_pointwise(model),
        *_products(model),
        *_spikes(model),
    ]


def _gated_linear_attention(model: ModelConfig) -> list[Case]:
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim

    def gla_inputs(draw: Draw, num_tokens: int) -> dict[str, Tensor]:
        q, k, v = _qkv(draw, num_tokens, heads, kv_heads, size)
        gate = draw.normal(1, num_tokens, kv_heads, size, dtype=torch.float32)
        return {"q": q, "k": k, "v": v, "log_decay": _decided(F.logsigmoid(gate) / 16)}

    def carry_inputs(draw: Draw, num_tokens: int) -> dict[str, Tensor]:
        found = gla_inputs(draw, num_tokens)
        found = {"o": draw.normal(1, num_tokens, heads, size), "q": found["q"], "log_decay": found["log_decay"]}
        return {**found, "state_in": draw.normal(kv_heads, size, size, dtype=torch.float32)}

    def gla_call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return (functions["gla"](x["q"], x["k"], x["v"], x["log_decay"])[0],)

    def carry_call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return (functions["gla_carry"](x["o"].clone(), x["q"], x["log_decay"], x["state_in"]),)

    return [
        Case(
            "gla",
            "",
            gla_inputs,
            gla_call,
            flops=lambda num_tokens: num_tokens * size * size * (3.0 * kv_heads + 2.0 * heads),
            peers=ops_peers.gla_peers(),
        ),
        Case("gla_carry", "copy included", carry_inputs, carry_call, reread=("q", "log_decay", "state_in")),
    ]


def _gated_delta_rule(model: ModelConfig) -> list[Case]:
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim

    def inputs(draw: Draw, num_tokens: int, heads: int, key_heads: int, value_heads: int) -> dict[str, Tensor]:
        q, k, v = (draw.normal(1, num_tokens, n, size) for n in (heads, key_heads, value_heads))
        gates = [draw.normal(1, num_tokens, value_heads, dtype=torch.float32) for _ in range(2)]
        q, k = (_decided(F.normalize(x.float(), dim=-1).to(x.dtype)) for x in (q, k))
        return {
            "q": q,
            "k": k,
            "v": v,
            "log_decay": _decided(F.logsigmoid(gates[0])),
            "beta": _decided(gates[1].sigmoid()),
        }

    def call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return (functions["gated_delta_rule"](x["q"], x["k"], x["v"], x["log_decay"], x["beta"])[0],)

    case = partial(Case, "gated_delta_rule", call=call, peers=ops_peers.gated_delta_rule_peers())
    return [
        case(
            f"{heads} q, {kv_heads} kv heads",
            inputs=partial(inputs, heads=heads, key_heads=kv_heads, value_heads=kv_heads),
            flops=lambda num_tokens: num_tokens * size * size * (5.0 * kv_heads + 2.0 * heads),
        ),
        case(
            f"{DELTA_HEADS} qk, {DELTA_VALUE_HEADS} v heads",
            inputs=partial(inputs, heads=DELTA_HEADS, key_heads=DELTA_HEADS, value_heads=DELTA_VALUE_HEADS),
            flops=lambda num_tokens: num_tokens * size * size * 7.0 * DELTA_VALUE_HEADS,
        ),
    ]


def _softmax_attention(model: ModelConfig) -> list[Case]:
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim

    def inputs(
        draw: Draw, num_tokens: int, *, documents: bool, num_sinks: int, halo: bool = False
    ) -> dict[str, Tensor]:
        found = dict(zip("qkv", _qkv(draw, num_tokens, heads, kv_heads, size)))
        if halo:
            found["q"] = _decided(found["q"][:, halo_tokens(num_tokens) :].clone())
        if documents:
            found["cu_seqlens"] = draw.constant(document_edges(num_tokens), torch.int32)
        if num_sinks:
            found.update({name: draw.normal(num_sinks, kv_heads, size) for name in ("sink_k", "sink_v")})
        return found

    def call(functions, x: Inputs, *, window: Optional[int]) -> tuple[Tensor, ...]:
        options = {name: x[name] for name in ("cu_seqlens", "sink_k", "sink_v") if name in x}
        return (functions["attention"](x["q"], x["k"], x["v"], window=window, **options),)

    def case(
        name: str, window: Optional[int], *, documents: bool = False, num_sinks: int = 0, halo: bool = False
    ) -> Case:
        """Attention over one row; halo: of its last tokens alone."""

        def flops(num_tokens: int) -> float:
            edges = document_edges(num_tokens) if documents else [0, num_tokens]
            without = visible_pairs([0, halo_tokens(num_tokens)], window) if halo else 0
            return 4.0 * size * heads * (visible_pairs(edges, window) - without + num_sinks * num_tokens)

        return Case(
            "attention",
            name,
            partial(inputs, documents=documents, num_sinks=num_sinks, halo=halo),
            partial(call, window=window),
            flops=flops,
            peers=ops_peers.attention_peers(window, documents=documents, sinks=bool(num_sinks)),
            backward=FLASH_BACKWARD,
        )

    window = model.window
    return [
        case("causal", None),
        case("causal, documents", None, documents=True),
        case(f"window {window}", window),
        case(f"window {window}, documents", window, documents=True),
        case(f"window {window}, {NUM_SINKS} sinks", window, num_sinks=NUM_SINKS),
        case(f"window {window}, halo", window, halo=True),
    ]


def _moba(model: ModelConfig) -> list[Case]:
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim

    def inputs(draw: Draw, num_tokens: int) -> dict[str, Tensor]:
        return dict(zip("qkv", _qkv(draw, num_tokens, heads, kv_heads, size)))

    def call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return (functions["moba"](x["q"], x["k"], x["v"], chunk_tokens=MOBA_CHUNK_TOKENS, num_chunks=MOBA_CHUNKS),)

    return [
        Case(
            "moba",
            f"{MOBA_CHUNKS} chunks of {MOBA_CHUNK_TOKENS}",
            inputs,
            call,
            flops=lambda num_tokens: 4.0 * size * heads * moba_pairs(num_tokens, MOBA_CHUNK_TOKENS, MOBA_CHUNKS),
            backward=FLASH_BACKWARD,
            check_tokens=2048,
            compared=False,
        )
    ]


def _pointwise(model: ModelConfig) -> list[Case]:
    eps = model.norm_eps

    def norm_inputs(draw: Draw, num_tokens: int, *, names: tuple[str, ...]) -> dict[str, Tensor]:
        found = {name: draw.normal(num_tokens, model.hidden_size) for name in names}
        return {**found, "weight": draw.normal(model.hidden_size, scale=0.1, mean=1.0)}

    def norm_call(functions, x: Inputs) -> tuple[Tensor, ...]:
        if "residual" in x:
            return tuple(functions["rms_norm"](x["x"], x["weight"], eps=eps, residual=x["residual"]))
        return (functions["rms_norm"](x["x"], x["weight"], eps=eps),)

    def rope_inputs(draw: Draw, num_tokens: int) -> dict[str, Tensor]:
        size = model.head_dim
        frequencies = model.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        return {
            "q": draw.normal(1, num_tokens, model.num_heads, size),
            "k": draw.normal(1, num_tokens, model.num_kv_heads, size),
            "positions": torch.arange(num_tokens, device=draw.device)[None],
            "inv_freq": frequencies.float().to(draw.device),
        }

    def rope_call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return functions["rope_qk"](x["q"], x["k"], x["positions"], x["inv_freq"])

    norm = partial(Case, "rms_norm", call=norm_call)
    return [
        norm("", inputs=partial(norm_inputs, names=("x",)), peers=ops_peers.rms_norm_peers(eps)),
        norm(
            "with residual",
            inputs=partial(norm_inputs, names=("x", "residual")),
            peers=ops_peers.add_rms_norm_peers(eps),
            reread=("x", "weight"),  # the sum is read again, not its two parts: as many bytes as one of them
            same_gradient=("residual",),
        ),
        Case(
            "rope",
            "queries and keys",
            rope_inputs,
            rope_call,
            peers=ops_peers.rope_peers(),
            reread=("positions", "inv_freq"),
        ),
        Case(
            "swiglu",
            "",
            lambda draw, num_tokens: {"gate_up": draw.normal(num_tokens, 2 * model.ffn_size)},
            lambda functions, x: (functions["swiglu"](x["gate_up"]),),
            peers=ops_peers.swiglu_peers(),
        ),
    ]


def _products(model: ModelConfig) -> list[Case]:
    hidden, ffn, vocab = model.hidden_size, model.ffn_size, model.vocab_size

    def loss_inputs(draw: Draw, num_tokens: int) -> dict[str, Tensor]:
        return {
            "hidden": draw.normal(num_tokens, hidden),
            "weight": draw.normal(vocab, hidden, scale=hidden**-0.5),
            "labels": draw.integers(0, vocab, num_tokens),
        }

    def loss_call(functions, x: Inputs) -> tuple[Tensor, ...]:
        return (functions["linear_cross_entropy"](x["hidden"], x["weight"], x["labels"]).mean(),)

    def expert_inputs(draw: Draw, num_tokens: int) -> dict[str, Tensor]:
        edges = [num_tokens * expert // NUM_EXPERTS for expert in range(NUM_EXPERTS + 1)]
        return {
            "x": draw.normal(num_tokens, hidden),
            "weight": draw.normal(NUM_EXPERTS, ffn, hidden, scale=hidden**-0.5),
            "offsets": draw.constant(edges, torch.int32),
        }

    return [
        Case(
            "linear_cross_entropy",
            "mean",
            loss_inputs,
            loss_call,
            flops=lambda num_tokens: 2.0 * num_tokens * hidden * vocab,
            peers=ops_peers.linear_cross_entropy_peers(),
            max_tokens=8192,
        ),
        Case(
            "grouped_mm",
            f"{NUM_EXPERTS} experts, balanced",
            expert_inputs,
            lambda functions, x: (functions["grouped_mm"](x["x"], x["weight"], offsets=x["offsets"]),),
            flops=lambda num_tokens: 2.0 * num_tokens * hidden * ffn,
            peers=ops_peers.grouped_mm_peers(),
        ),
    ]


def _spikes(model: ModelConfig) -> list[Case]:
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

    group = min(INT8_GROUP, hidden & -hidden)
    return [
        case("qkv", hidden, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim, hidden // group),
        case("gate_up", hidden, 2 * ffn, hidden // group),
        case("gate_up, a scale a row", hidden, 2 * ffn, 1),
        case("down", ffn, hidden, ffn // min(INT8_GROUP, ffn & -ffn)),
    ]


def document_edges(num_tokens: int) -> list[int]:
    """cu_seqlens of the packed cases."""
    return [int(part * num_tokens) for part in EDGES]


def halo_tokens(num_tokens: int) -> int:
    """Tokens at the front of a row that have keys and no queries, in the halo case."""
    return num_tokens // 4


def visible_pairs(edges: list[int], window: Optional[int]) -> int:
    """Pairs of query and visible key of causal documents, the query itself included."""
    total = 0
    for length in (end - start for start, end in zip(edges, edges[1:])):
        seen = length if window is None else min(window, length)
        total += seen * (seen + 1) // 2 + (length - seen) * seen
    return total


def moba_pairs(num_tokens: int, chunk_tokens: int, num_chunks: int) -> int:
    """Pairs of query and attended key: the own chunk causally and up to num_chunks - 1 whole past ones."""
    whole, rest = divmod(num_tokens, chunk_tokens)
    lengths = [chunk_tokens] * whole + [rest]
    past = (min(number, num_chunks - 1) * chunk_tokens for number in range(len(lengths)))
    return sum(length * (length + 1) // 2 + length * seen for length, seen in zip(lengths, past))


def _qkv(draw: Draw, num_tokens: int, heads: int, kv_heads: int, size: int) -> list[Tensor]:
    return [draw.normal(1, num_tokens, n, size) for n in (heads, kv_heads, kv_heads)]


def _decided(x: Tensor) -> Tensor:
    """x as an input of its own, cut from what made it."""
    return x.detach().requires_grad_()
