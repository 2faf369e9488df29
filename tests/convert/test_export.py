"""Exports: what is in the folder, that transformers runs it and agrees with plain torch, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from plain_model import plain_logits
from sbtrain.config.model_schema import GLAConfig, ModelConfig, RopeScaling
from sbtrain.convert import export as export_module
from sbtrain.convert.export import export
from sbtrain.convert.export_config import gla_swa_refusal
from sharding import global_state, hf_state
from tiny_checkpoints import DictReader, filled, model_of, save_tiny
from tiny_corpus import write_tokenizer

RELEASED = ModelConfig(
    pattern="LS", vocab_size=90, hidden_size=32, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=4, ffn_size=40,
    norm_eps=1e-6, rope_theta=1e4, max_positions=512, tie_embeddings=False, qkv_bias=True, qk_norm=False, window=7,
    vocab_multiple=64,
)  # fmt: skip
MODELS = {
    "released": RELEASED,
    "no_bias_tied": dataclasses.replace(RELEASED, qkv_bias=False, tie_embeddings=True, pattern="SLLS"),
    "qk_norm_full": dataclasses.replace(RELEASED, qk_norm=True, head_dim=8, pattern="FSL", num_layers=3),
    "llama3_odd_heads": dataclasses.replace(
        RELEASED, pattern="LF", num_heads=9, num_kv_heads=3, qkv_bias=False, tie_embeddings=True,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), gla=GLAConfig(gate_rank=5, gate_normalizer=4.0),
    ),
}  # fmt: skip


def _export(folder, model, *, dtype="fp32", **options):
    """The exported folder and the weights under the family's names."""
    state = global_state(model)
    export(DictReader(state), model=model, out=folder, dtype=dtype, **options)
    return hf_state(state, model)


def _load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_runs_the_export_and_agrees_with_plain_torch(tmp_path, name):
    model = MODELS[name]
    theirs = _export(tmp_path / "out", model)
    student = _load(tmp_path / "out")
    tokens = torch.randint(0, model.vocab_size, (2, 75))
    with torch.no_grad():
        logits = student(tokens).logits
    expected = plain_logits({key: tensor.double() for key, tensor in theirs.items()}, model, tokens)
    assert logits.shape == expected.shape
    difference = logits.double() - expected  # single precision against double
    assert difference.norm() < 1e-5 * expected.norm() and difference.abs().max() < 5e-4


@pytest.mark.parametrize("name", MODELS)
def test_cached_pieces_equal_the_whole(tmp_path, name):
    """Prefill, then chunks that are longer and shorter than the window, then single tokens."""
    model = MODELS[name]
    _export(tmp_path / "out", model)
    student = _load(tmp_path / "out")
    tokens = torch.randint(0, model.vocab_size, (2, 60))
    with torch.no_grad():
        whole = student(tokens).logits
        cache, pieces = None, []
        for piece in tokens.split([20, 3, 10, 1, 1, 17, 1, 1, 6], 1):
            output = student(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    difference = torch.cat(pieces, 1) - whole
    assert difference.norm() < 1e-5 * whole.norm() and difference.abs().max() < 5e-4


def test_cache_is_constant_but_for_full_attention(tmp_path):
    model = MODELS["qk_norm_full"]
    _export(tmp_path / "out", model)
    student = _load(tmp_path / "out")
    sizes = []
    for num_tokens in (20, 40):
        with torch.no_grad():
            cache = student(torch.zeros(1, num_tokens, dtype=torch.long), use_cache=True).past_key_values
        sizes.append([sum(tensor.untyped_storage().nbytes() for tensor in cache.states[i]) for i in range(3)])
    assert sizes[1][0] == 2 * sizes[0][0] and sizes[1][1:] == sizes[0][1:]
    assert sizes[0][1] == 2 * 2 * (model.window - 1) * 8 * 4  # keys and values, heads, tokens, size, bytes


@pytest.mark.parametrize("name", MODELS)
def test_generate_equals_recomputing_every_step(tmp_path, name):
    model = MODELS[name]
    theirs = _export(tmp_path / "out", model)
    student = _load(tmp_path / "out")
    prompt = torch.randint(0, model.vocab_size, (2, 13))
    generated = student.generate(prompt, max_new_tokens=12, do_sample=False)
    expected = prompt
    state = {key: tensor.double() for key, tensor in theirs.items()}
    for _ in range(12):
        following = plain_logits(state, model, expected)[:, -1].argmax(-1)
        expected = torch.cat([expected, following[:, None]], 1)
    assert torch.equal(generated, expected)
    uncached = student.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(uncached, expected)


@pytest.mark.parametrize("name", ["released", "qk_norm_full"])
def test_left_padded_batch_generates_what_each_prompt_does_alone(tmp_path, name):
    model = MODELS[name]
    _export(tmp_path / "out", model)
    student = _load(tmp_path / "out")
    prompts = [torch.randint(0, model.vocab_size, (length,)) for length in (17, 4, 11)]
    batch, mask = torch.full((3, 17), 5), torch.zeros(3, 17, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 17 - len(prompt) :], mask[row, 17 - len(prompt) :] = prompt, 1
    together = student.generate(batch, attention_mask=mask, max_new_tokens=10, do_sample=False)[:, 17:]
    for row, prompt in enumerate(prompts):
        alone = student.generate(prompt[None], max_new_tokens=10, do_sample=False)[0, len(prompt) :]
        assert torch.equal(together[row], alone), row


def test_beam_search_and_loss_run(tmp_path):
    _export(tmp_path / "out", RELEASED)
    student = _load(tmp_path / "out")
    prompt = torch.randint(0, 90, (2, 9))
    cached = student.generate(prompt, max_new_tokens=6, do_sample=False, num_beams=3)
    assert torch.equal(
        cached, student.generate(prompt, max_new_tokens=6, do_sample=False, num_beams=3, use_cache=False)
    )
    output = student(prompt, labels=prompt)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), prompt[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_gla_swa_folder_is_the_released_one(tmp_path):
    theirs = _export(tmp_path / "out", RELEASED, format="gla_swa")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gla_swa" and config["architectures"] == ["GLAswaForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_gla_swa.GLAswaConfig",
        "AutoModelForCausalLM": "modeling_gla_swa.GLAswaForCausalLM",
    }
    assert config["sliding_window"] == 6 and config["attn_layers"] == [1, 3] and config["vocab_size"] == 90
    weights = load_file(tmp_path / "out" / "model.safetensors")
    renames = {"embed_tokens": "embeddings", "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    renames["self_attn"] = "attn"
    named = {".".join(renames.get(part, part) for part in key.split(".")): value for key, value in theirs.items()}
    assert weights.keys() == named.keys() and all(torch.equal(weights[key], named[key]) for key in named)
    assert weights["model.embeddings.weight"].shape == (90, 32)
    assert weights["model.layers.0.attn.gk_proj.1.bias"].shape == (8,)
    assert weights["model.layers.2.attn.g_norm.weight"].shape == (4,)


def test_gla_swa_adds_what_the_released_code_has(tmp_path):
    model = MODELS["no_bias_tied"]
    assert export(DictReader(global_state(model)), model=model, out=tmp_path / "out") == "gla_swa"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert config["tie_word_embeddings"] is False and config["torch_dtype"] == "bfloat16"
    assert torch.equal(weights["lm_head.weight"], weights["model.embeddings.weight"])
    for layer in range(4):
        for leaf, size in (("q", 32), ("k", 8), ("v", 8)):
            assert torch.equal(
                weights[f"model.layers.{layer}.attn.{leaf}_proj.bias"], torch.zeros(size, dtype=torch.bfloat16)
            )


def test_own_format_keeps_ties_and_missing_biases(tmp_path):
    model = MODELS["llama3_odd_heads"]
    assert export(DictReader(global_state(model)), model=model, out=tmp_path / "out") == "sbtrain"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert config["model_type"] == "sbtrain_hybrid" and config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights and not any(key.endswith("q_proj.bias") for key in weights)
    student = _load(tmp_path / "out")
    assert student.lm_head.weight is student.model.embeddings.weight


@pytest.mark.parametrize("form", ["gla_swa", "sbtrain"])
def test_export_of_a_converted_start_is_bitwise_the_teacher(tmp_path, form):
    save_tiny(tmp_path / "teacher", "qwen2", dtype=torch.bfloat16)
    model = model_of(tmp_path / "teacher")
    state = filled(model, str(tmp_path / "teacher"), dtype=torch.float32)
    export(DictReader(state), model=model, out=tmp_path / "out", format=form)
    weights, teacher = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "teacher"))
    renames = {"embeddings": "embed_tokens", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    renames["attn"] = "self_attn"
    back = {".".join(renames.get(part, part) for part in key.split(".")): value for key, value in weights.items()}
    assert all(torch.equal(back[key], teacher[key]) for key in teacher)
    assert all("gk_proj" in key or "g_norm" in key for key in back.keys() - teacher.keys())


def test_tokenizer_and_special_tokens_come_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3], "vocab_size": 7}))
    for name in ("tokenizer.json", "generation_config.json"):
        (source / name).write_text(f'{{"from": "{name}"}}')
    (source / "notes.txt").write_text("stays")
    _export(tmp_path / "out", RELEASED, tokenizer_dir=source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 3], None)
    assert config["vocab_size"] == 90
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"from": "tokenizer.json"}
    assert (tmp_path / "out" / "generation_config.json").exists() and not (tmp_path / "out" / "notes.txt").exists()


def test_shards_and_index(tmp_path):
    _export(tmp_path / "one", RELEASED)
    _export(tmp_path / "many", RELEASED, max_shard_bytes=20_000)
    shards = sorted((tmp_path / "many").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 25_000 for path in shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = load_file(tmp_path / "one" / "model.safetensors"), {}
    for path in shards:
        part = load_file(path)
        assert all(index["weight_map"][key] == path.name for key in part)
        many |= part
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    tokens = torch.randint(0, 90, (1, 20))
    with torch.no_grad():
        assert torch.equal(_load(tmp_path / "one")(tokens).logits, _load(tmp_path / "many")(tokens).logits)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qk_norm": True}, "no q/k norms"),
        ({"pattern": "LF"}, "no full-attention layers"),
        ({"head_dim": 8}, "head_dim is hidden_size / num_heads"),
        ({"rope_scaling": RopeScaling()}, "RoPE has no scaling"),
        ({"gla": GLAConfig(gate_rank=8)}, "rank 16 and normalizer 16"),
    ],
)
def test_gla_swa_refusals(tmp_path, change, reason):
    model = dataclasses.replace(RELEASED, **change)
    with pytest.raises(ValueError, match=f"format=gla_swa: .*{reason}; use format=hf"):
        export(DictReader({}), model=model, out=tmp_path / "out", format="gla_swa")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", ["LS", "S", "L"])
def test_a_model_with_qk_norms_does_not_fit_the_released_code(pattern):
    assert "q/k norms" in gla_swa_refusal(dataclasses.replace(RELEASED, qk_norm=True, pattern=pattern))


def test_bad_arguments_write_nothing(tmp_path):
    reader, out = DictReader(global_state(RELEASED)), tmp_path / "out"
    with pytest.raises(ValueError, match="format=gguf is not known; choose one of hf, gla_swa, sbtrain, sbtrain_moe"):
        export(reader, model=RELEASED, out=out, format="gguf")
    with pytest.raises(ValueError, match="dtype=int8 is not known; choose one of bf16, fp16, fp32"):
        export(reader, model=RELEASED, out=out, dtype="int8")
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="out=.*out exists; choose another folder"):
        export(reader, model=RELEASED, out=out)


def test_an_empty_folder_is_a_free_place(tmp_path):
    (tmp_path / "out").mkdir()
    export(DictReader(global_state(RELEASED)), model=RELEASED, out=tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_special_ids_come_from_the_source_and_tokenizer_files_from_the_tokenizer(tmp_path):
    source, tokenizer = tmp_path / "source", tmp_path / "tokenizer"
    source.mkdir()
    (source / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 5}')
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    write_tokenizer(tokenizer)
    read = lambda out, name: json.loads((tmp_path / out / name).read_text())  # noqa: E731
    how = dict(model=RELEASED, tokenizer_dir=tokenizer)
    export(DictReader(global_state(RELEASED)), out=tmp_path / "both", source_dir=source, **how)
    assert [read("both", "config.json")[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [7, 5, None]
    assert read("both", "generation_config.json") == {"eos_token_id": [5, 6]}
    assert (tmp_path / "both/tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    export(DictReader(global_state(RELEASED)), out=tmp_path / "alone", **how)
    assert read("alone", "config.json")["eos_token_id"] == 0, "what the tokenizer puts behind every document"


def test_failures_leave_no_folder(tmp_path, monkeypatch):
    state = global_state(RELEASED)
    wrong = {**state, "decoder.layers.3.mlp.linear_fc2.weight": torch.zeros(32, 41)}
    with pytest.raises(ValueError, match=r"linear_fc2.weight has shape \[32, 41\], the recipe's model has \[32, 40\]"):
        export(DictReader(wrong), model=RELEASED, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"out=.*: 1000 bytes are free, the export needs \d+; free space"):
        export(DictReader(state), model=RELEASED, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_lies_is_noticed(tmp_path, monkeypatch):
    writer = export_module.ShardWriter
    close = writer.close

    def close_and_damage(self):
        close(self)
        path = next(self._folder.glob("*.safetensors"))
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(writer, "close", close_and_damage)
    with pytest.raises(ValueError, match="tensor .* reads back differently"):
        _export(tmp_path / "out", RELEASED)
    assert list(tmp_path.iterdir()) == []
