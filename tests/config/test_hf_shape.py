"""Shapes of Hugging Face folders: equal to what transformers reads, and refused where our blocks would differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sbtrain.config.hf_shape import complete_shape, read_shape
from sbtrain.config.model_schema import ModelConfig, RopeScaling

SMALL = {
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "llama3",
}


def folder(tmp_path: Path, **config) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tie", [False, True])
def test_equals_what_transformers_saves(family, tie, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family, **SMALL, head_dim=16, tie_word_embeddings=tie, rms_norm_eps=1e-5, max_position_embeddings=77,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        attention = transformers.AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    shape = read_shape(tmp_path)
    assert shape["head_dim"] == attention.head_dim == 16
    assert shape["qkv_bias"] == (attention.q_proj.bias is not None)
    assert attention.o_proj.bias is None
    assert shape["qk_norm"] == hasattr(attention, "q_norm")
    assert (shape["tie_embeddings"], shape["norm_eps"], shape["max_positions"]) == (tie, 1e-5, 77)
    assert (shape["rope_theta"], shape["rope_scaling"]) == (5e5, None)
    assert {key: shape[key] for key in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")} == {
        "vocab_size": 100, "hidden_size": 48, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
    }  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_defaults_are_those_of_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path, model_type=family, **SMALL)
    theirs, ours = transformers.AutoConfig.from_pretrained(path), read_shape(path)
    assert ours["head_dim"] == (getattr(theirs, "head_dim", None) or 48 // 4)
    assert ours["norm_eps"] == theirs.rms_norm_eps and ours["max_positions"] == theirs.max_position_embeddings
    assert ours["tie_embeddings"] == theirs.tie_word_embeddings
    assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"]


def test_qwen2_5_7b_as_published(tmp_path):
    shape = read_shape(folder(
        tmp_path, architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, hidden_act="silu",
        hidden_size=3584, initializer_range=0.02, intermediate_size=18944, max_position_embeddings=131072,
        max_window_layers=28, model_type="qwen2", num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
        rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=False,
        torch_dtype="bfloat16", use_cache=True, use_mrope=False, use_sliding_window=False, vocab_size=152064,
    ))  # fmt: skip
    recipe = {
        "vocab_size": 152064, "hidden_size": 3584, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4,
        "head_dim": 128, "ffn_size": 18944, "norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None,
        "max_positions": 131072, "tie_embeddings": False, "qkv_bias": True, "qk_norm": False,
    }  # fmt: skip
    assert shape == recipe


def test_absent_kv_heads_mean_one_per_query_head(tmp_path):
    config = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    assert read_shape(folder(tmp_path, model_type="llama", **config))["num_kv_heads"] == 4


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}},
        },
    ],
)
def test_llama3_scaling_in_old_and_new_form(rope, tmp_path):
    shape = read_shape(folder(tmp_path, model_type="llama", **SMALL, **rope))
    assert shape["rope_theta"] == 5e5
    assert shape["rope_scaling"] == RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=4096
    )


REFUSED = [
    ({"model_type": "mamba"}, ["model_type 'mamba'", "llama, qwen2, qwen3"]),
    ({"model_type": None}, ["model_type None"]),
    ({"attention_bias": True}, ["attention_bias True", "o_proj"]),
    ({"attention_bias": True, "model_type": "qwen3"}, ["attention_bias True"]),
    ({"mlp_bias": True}, ["mlp_bias True"]),
    ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
    ({"use_sliding_window": True, "model_type": "qwen2"}, ["use_sliding_window True"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "full-attention"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling of type 'yarn'", "default, llama3"]),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, ["rope_parameters of type 'linear'"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["lacks low_freq_factor"]),
    ({"hidden_size": None}, ["hidden_size is None"]),
    ({"num_hidden_layers": "4"}, ["num_hidden_layers is '4'"]),
    ({"hidden_size": 50}, ["head_dim is absent"]),
    ({"rms_norm_eps": None}, ["rms_norm_eps is None", "a positive number"]),
    ({"rms_norm_eps": "abc"}, ["rms_norm_eps is 'abc'"]),
    ({"rope_theta": None}, ["rope_theta is None"]),
    ({"rope_parameters": [1]}, ["rope_parameters is [1]"]),
    ({"max_position_embeddings": "64"}, ["max_position_embeddings is '64'"]),
    ({"max_position_embeddings": None}, ["max_position_embeddings is None"]),
    ({"layer_types": 3}, ["layer_types is 3", "a list"]),
    ({"tie_word_embeddings": "false"}, ["tie_word_embeddings is 'false'", "true or false"]),
]


@pytest.mark.parametrize(("change", "parts"), REFUSED)
def test_what_our_blocks_cannot_compute_is_refused(change, parts, tmp_path):
    with pytest.raises(ValueError) as caught:
        read_shape(folder(tmp_path, **{"model_type": "llama", **SMALL, **change}))
    text = str(caught.value)
    assert all(part in text for part in [*parts, "config.json"]) and "\n" not in text, text


def test_files_that_are_not_a_config(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        read_shape(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        read_shape(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidd')
    with pytest.raises(ValueError, match="config.json is not readable JSON"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        read_shape(tmp_path)


def test_llama3_scaling_without_its_original_length_means_max_positions(tmp_path):
    """As transformers completes it."""
    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    shape = read_shape(folder(tmp_path, model_type="llama", **SMALL, max_position_embeddings=777, rope_scaling=rope))
    assert shape["rope_scaling"].original_max_positions == 777


def test_max_positions_may_be_extended(tmp_path):
    path = str(folder(tmp_path, model_type="llama", **SMALL))
    assert complete_shape(ModelConfig(max_positions=131072), path).max_positions == 131072


def test_given_fields_stay_and_must_agree(tmp_path):
    path = str(folder(tmp_path, model_type="llama", **SMALL))
    model = complete_shape(ModelConfig(pattern="LS", num_heads=4, window=9), path)
    assert (model.pattern, model.window, model.num_heads, model.hidden_size) == ("LS", 9, 4, 48)
    with pytest.raises(ValueError, match="model.num_heads=8 contradicts num_heads 4 of start.path="):
        complete_shape(ModelConfig(num_heads=8), path)
    with pytest.raises(ValueError, match="model.vocab_size is not known: start.path is empty"):
        complete_shape(ModelConfig(), "")
