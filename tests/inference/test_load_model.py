"""Models come back from runs, source checkpoints and our exports with their weights; refusals in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.config.model_schema import GLAConfig, RopeScaling
from sbtrain.convert.exported import read_model
from sbtrain.inference.load import Where, load_model
from tiny_model import (
    EOS,
    MODEL,
    build,
    exact_logits,
    parallel_logits,
    write_export,
    write_run,
    write_tokenizer,
)

MODELS = {
    "gla_swa": replace(MODEL, pattern="SLLS"),
    "gla_swa_no_bias_tied": replace(MODEL, qkv_bias=False, tie_embeddings=True),
    "sbtrain_hybrid": replace(
        MODEL, pattern="LFSF", qk_norm=True, qkv_bias=False, tie_embeddings=True, head_dim=12, window=3,
        gla=GLAConfig(gate_rank=5, gate_normalizer=4.0), rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
    ),
}  # fmt: skip


@pytest.fixture
def mesh():
    with Mesh.build(Layout()) as mesh:
        yield mesh


@pytest.mark.parametrize("name", MODELS)
def test_an_export_comes_back(mesh, tmp_path, name):
    config = MODELS[name]
    folder = write_export(tmp_path / "export", config)
    loaded = load_model(Where(model=str(folder)), mesh)
    tokens = torch.randint(config.vocab_size, (30,))
    assert torch.equal(parallel_logits(loaded.model, tokens), parallel_logits(build(config, mesh), tokens))
    assert (loaded.config.window, loaded.config.gla) == (config.window, config.gla)
    assert loaded.stop_ids == {EOS} and loaded.tokenizer.eos_id == EOS and loaded.recipe is None


def test_an_export_describes_its_model(tmp_path):
    config = MODELS["sbtrain_hybrid"]
    came_back = read_model(write_export(tmp_path / "export", config))
    assert came_back == replace(config, vocab_multiple=came_back.vocab_multiple)


def test_a_run_comes_back(mesh, tmp_path):
    config = replace(MODEL, pattern="LSFS")
    run = write_run(tmp_path / "run", config)
    loaded = load_model(Where(run=str(run)), mesh)
    tokens = torch.randint(config.vocab_size, (30,))
    torch.testing.assert_close(
        parallel_logits(loaded.model, tokens).double(), exact_logits(config, tokens), atol=3e-5, rtol=0
    )
    assert loaded.recipe.name == "tiny" and loaded.origin == run / "checkpoints" / "step_5"
    half = load_model(Where(run=str(run), step="5", precision="bf16"), mesh)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


def test_a_source_checkpoint_comes_unconverted(mesh, tmp_path):
    shape = dict(vocab_size=300, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
                 num_hidden_layers=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=7)  # fmt: skip
    teacher = Qwen2ForCausalLM(Qwen2Config(**shape)).float().eval()
    folder = write_tokenizer(tmp_path / "teacher")
    teacher.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    loaded = load_model(Where(model=str(folder)), mesh)
    tokens = torch.randint(300, (25,))
    with torch.no_grad():
        expected = teacher(tokens[None]).logits[0]
    torch.testing.assert_close(parallel_logits(loaded.model, tokens), expected, atol=3e-5, rtol=0)
    assert loaded.config.pattern == "F" and loaded.stop_ids == {EOS, 7, 9}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (Where(), "give model=FOLDER"),
        (Where(model="a", run="b"), "one of them"),
        (Where(model="nowhere"), "model=nowhere is not a folder"),
        (Where(model="empty"), "empty has no config.json"),
        (Where(model="bert"), "model_type 'bert' is not supported"),
        (Where(model="export", precision="int3"), "precision=int3"),
        (Where(model="export", step="5"), "step= picks a checkpoint of run="),
        (Where(model="no_weights"), "model: no_weights holds neither model.safetensors nor"),
        (Where(model="no_tokenizer"), "tokenizer.json is missing"),
        (Where(model="other_shape"), "tensor model.layers.0.self_attn.q_proj.weight has shape"),
        (Where(model="fewer_layers"), "2 unused|layers.2"),
        (Where(run="empty"), "run=empty is no run directory"),
        (Where(run="run", step="6"), "step=6: .* there are: step_5"),
        (Where(run="new_run"), "has no checkpoint yet"),
    ],
)
def test_refusals(mesh, tmp_path, monkeypatch, where, message):
    monkeypatch.chdir(tmp_path)
    write_broken(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_model(where, mesh)
    assert "\n" not in str(error.value)


def write_broken(folder):
    """Folders that lack or contradict something."""
    (folder / "empty").mkdir()
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    whole = write_export(folder / "export", MODEL)
    for name in ("no_weights", "no_tokenizer", "other_shape", "fewer_layers"):
        shutil.copytree(whole, folder / name)
    (folder / "no_weights" / "model.safetensors").unlink()
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    for name, change in {"other_shape": {"num_attention_heads": 8}, "fewer_layers": {"num_hidden_layers": 2}}.items():
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change, "head_dim": 8}))
    write_run(folder / "run", MODEL)
    shutil.copytree(folder / "run", folder / "new_run")
    (folder / "new_run" / "ledger.json").unlink()
    shutil.rmtree(folder / "new_run" / "checkpoints")
