"""FLOPs and parameters by part, against published counts, transformers, and counting by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sbtrain.config.load import load
from sbtrain.config.pattern import LayerKind
from sbtrain.config.schema import ModelConfig
from sbtrain.model.flops import (
    flops_per_token,
    head_flops_per_token,
    layer_flops,
    layer_flops_per_token,
    parameters,
    training_flops_per_token,
    visible_keys,
)

TINY = ModelConfig(
    vocab_size=100, hidden_size=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, ffn_size=40, norm_eps=1e-6,
    rope_theta=1e4, max_positions=64, tie_embeddings=False, qkv_bias=True, qk_norm=False, vocab_multiple=4, window=5,
)  # fmt: skip


def shape(name: str, pattern: str | None = None) -> ModelConfig:
    model = load([f"recipe={name}", "dry_run=true"]).model
    return model if pattern is None else replace(model, pattern=pattern)


@pytest.mark.parametrize(
    ("name", "pattern", "count"),
    [
        ("7b_cpt", None, 7_616_542_976),  # SpikingBrain-7B
        ("7b_cpt", "F", 7_615_616_512),  # Qwen2.5-7B
        ("7b_cpt", "S", 7_615_616_512),
        ("qwen2_5_0_5b_cpt", "F", 494_032_768),  # Qwen2.5-0.5B
        ("demo", "F", 134_515_008),  # SmolLM2-135M, tied
    ],
)
def test_parameters_of_published_models(name, pattern, count):
    assert sum(parameters(shape(name, pattern)).values()) == count


def test_gates_of_the_7b_model():
    parts = parameters(shape("7b_cpt"))
    assert parts["gate"] == 14 * (16 * 3584 + 512 * 16 + 512)
    assert parts["norms"] == (2 * 28 + 1) * 3584 + 14 * 128


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tie", [False, True])
def test_parameters_equal_those_of_transformers(family, tie):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family, vocab_size=100, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=40, head_dim=8 if family == "qwen3" else 4, tie_word_embeddings=tie,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    ours = replace(
        TINY, head_dim=8 if family == "qwen3" else 4, tie_embeddings=tie, qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )  # fmt: skip
    assert sum(parameters(ours).values()) == sum(parameter.numel() for parameter in theirs.parameters())


def test_linear_layers_drop_the_head_norms():
    full, linear = (parameters(replace(TINY, pattern=p, qk_norm=True))["norms"] for p in "FL")
    assert full - linear == 2 * (2 * 8 - 8)


def test_padding_counts_as_parameters_but_not_as_work():
    padded = replace(TINY, vocab_multiple=64)
    assert parameters(padded)["lm_head"] == 128 * 24 and flops_per_token(padded, 8)["lm_head"] == 2 * 100 * 24


@pytest.mark.parametrize("seq_len", [1, 4, 5, 6, 31])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_visible_keys_equal_the_mask(seq_len, window):
    t = torch.arange(seq_len)
    mask = t[None, :] <= t[:, None]
    if window is not None:
        mask &= t[:, None] - t[None, :] < window
    assert visible_keys(seq_len, window) == pytest.approx(mask.sum().item() / seq_len)


def test_matrix_products_equal_torchs_count():
    from torch.utils.flop_counter import FlopCounterMode

    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=100, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=40, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 16, dtype=torch.long), use_cache=False)
    by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    parts = flops_per_token(replace(TINY, head_dim=4), 16)
    linear = sum(by_op.get(op, 0) for op in ("aten.mm", "aten.addmm"))
    assert linear == 16 * (parts["projections"] + parts["mlp"] + parts["lm_head"])
    # torch counts whole T x T squares; we count the visible part
    assert by_op["aten.bmm"] == pytest.approx(16 * parts["full_attention"] * 16 / visible_keys(16))


def test_state_flops_equal_the_recurrence_counted_by_hand():
    num_decays = num_outer = num_reads = 0
    for _ in range(TINY.num_kv_heads):
        num_decays += 8 * 8  # one product for each element of the state
        num_outer += 2 * 8 * 8  # k v, added to the state
        num_reads += 3 * 2 * 8 * 8  # three query heads a group
    assert layer_flops(TINY, LayerKind(("L",)), 99)["gated_linear_attention"] == num_decays + num_outer + num_reads
    assert layer_flops(TINY, LayerKind(("L",)), 99)["gate"] == 2 * 16 * 24 + 2 * 16 * 16


def test_teacher_equals_the_usual_formula():
    """6 N + 6 L h s for the causal teacher, as everybody quotes it: 47.4, 62.2 and 121.3 GFLOP a token."""
    teacher = shape("7b_cpt", "F")
    for seq_len, quoted in ((8192, 47.4), (32768, 62.2), (131072, 121.3)):
        usual = 6 * (7_615_616_512 - 152064 * 3584) + 6 * 28 * 3584 * seq_len
        assert training_flops_per_token(teacher, seq_len) == pytest.approx(usual, rel=1e-3)
        assert training_flops_per_token(teacher, seq_len) / 1e9 == pytest.approx(quoted, abs=0.06)


def test_the_hybrid_hardly_grows_with_the_context():
    hybrid = shape("7b_cpt")
    assert training_flops_per_token(hybrid, 131072) < 1.02 * training_flops_per_token(hybrid, 8192)


def test_layers_and_head_add_up():
    for pattern in ("F", "LS", "SL", "L"):
        model = replace(TINY, pattern=pattern)
        total = sum(layer_flops_per_token(model, 50)) + head_flops_per_token(model)
        assert total == pytest.approx(sum(flops_per_token(model, 50).values()))
    assert flops_per_token(TINY, 50)["embedding"] == 0
