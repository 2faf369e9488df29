"""The weight table: names, orders, shards, and that import followed by export changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from sbtrain.config.schema import ModelConfig
from sbtrain.convert.export import export_tensors
from sbtrain.convert.weights import table
from sharding import hf_state, local_shard
from tiny_checkpoints import FAMILIES, DictReader, filled, model_of, save_tiny

TINY = ModelConfig(
    pattern="LFS", vocab_size=50, hidden_size=12, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, ffn_size=10,
    norm_eps=1e-6, rope_theta=1e4, max_positions=64, tie_embeddings=False, qkv_bias=True, qk_norm=True,
    vocab_multiple=16,
)  # fmt: skip


def test_names_and_shapes_are_the_contract():
    layer = "decoder.layers.{}."
    mixer = layer + "self_attention."
    every = {
        layer + "input_layernorm.weight": (12,),
        mixer + "linear_qkv.weight": (40, 12),
        mixer + "linear_qkv.bias": (40,),
        mixer + "linear_proj.weight": (12, 24),
        layer + "pre_mlp_layernorm.weight": (12,),
        layer + "mlp.linear_fc1.weight": (20, 12),
        layer + "mlp.linear_fc2.weight": (12, 10),
    }
    linear = {
        mixer + "gate_down.weight": (16, 12),
        mixer + "gate_up.weight": (8, 16),
        mixer + "gate_up.bias": (8,),
        mixer + "out_norm.weight": (4,),
    }
    softmax = {mixer + "q_norm.weight": (4,), mixer + "k_norm.weight": (4,)}
    expected = {"embedding.word_embeddings.weight": (64, 12), "output_layer.weight": (64, 12)}
    expected["decoder.final_layernorm.weight"] = (12,)
    for i, extra in enumerate((linear, softmax, softmax)):
        expected |= {name.format(i): shape for name, shape in {**every, **extra}.items()}
    assert {row.name: row.shape for row in table(TINY)} == expected


def test_tied_model_has_no_output_matrix():
    names = [row.name for row in table(dataclasses.replace(TINY, tie_embeddings=True))]
    assert "output_layer.weight" not in names and len(names) == len(set(names))


@pytest.mark.parametrize("pattern", ["LB", "(LE)", "LF:mE:mS"])
def test_unknown_layer_kinds_are_refused(pattern):
    model = dataclasses.replace(TINY, pattern=pattern, num_layers=4)
    with pytest.raises(ValueError, match=r"model.pattern .* layer [012] is .*import and export know F, S and L, alone"):
        table(model)


@pytest.mark.parametrize("pattern", ["F", "LS"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise(tmp_path, family, pattern):
    save_tiny(tmp_path, family, dtype=torch.bfloat16)
    theirs = load_file(tmp_path / "model.safetensors")
    model = model_of(tmp_path, pattern=pattern)
    state = filled(model, str(tmp_path), dtype=torch.bfloat16)
    back = dict(export_tensors(DictReader(state), model))
    reference = hf_state(state, model)
    assert back.keys() == reference.keys()
    assert all(torch.equal(back[name], reference[name]) for name in back)
    added = {name for name in back if "gk_proj" in name or "g_norm" in name}
    left = {name for name in theirs if "q_norm" in name or "k_norm" in name} if pattern == "LS" else set()
    left = {name for name in left if name.split(".")[2] in ("0", "2")}
    assert back.keys() - added == theirs.keys() - left
    assert all(torch.equal(back[name], theirs[name]) for name in back.keys() - added)
    assert len(added) == (8 if pattern == "LS" else 0)


@pytest.mark.parametrize(("family", "tp"), [("qwen2", 2), ("qwen2", 3), ("qwen3", 2), ("qwen3", 3), ("llama", 3)])
def test_shards_are_parts_of_the_whole(tmp_path, family, tp):
    save_tiny(tmp_path, family)
    model = model_of(tmp_path, pattern="LS")
    whole = filled(model, str(tmp_path))
    assert not any(tensor.isnan().any() for tensor in whole.values())
    for rank in range(tp):
        local = filled(model, str(tmp_path), tp_rank=rank, tp=tp)
        for name, tensor in local.items():
            assert torch.equal(tensor, local_shard(name, whole[name], tp_rank=rank, tp=tp)), name


def test_vocabulary_padding_is_zero_even_when_it_fills_shards(tmp_path):
    save_tiny(tmp_path, "llama")
    model = model_of(tmp_path, vocab_multiple=240)
    for rank in range(3):
        rows = filled(model, str(tmp_path), tp_rank=rank, tp=3)["output_layer.weight"]
        num_real = 77 if rank == 0 else 0
        assert rows.shape[0] == 80 and rows[:num_real].abs().sum(1).min() > 0 if num_real else not rows.any()
        assert not rows[num_real:].any()


def test_tp_that_does_not_divide_is_refused(tmp_path):
    save_tiny(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"layout.tp 2 does not divide .*linear_qkv.weight"):
        filled(model_of(tmp_path, vocab_multiple=26), str(tmp_path), tp=2)
