"""The first weights: inherited, converted and drawn, the same under every layout; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sbtrain.config.schema import ModelConfig
from sbtrain.convert.start import fill, new_parameters
from sbtrain.convert.weights import table
from sharding import local_shard
from tiny_checkpoints import filled, model_of, save_tiny

SCRATCH = ModelConfig(
    pattern="LS", vocab_size=70, hidden_size=24, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=4, ffn_size=30,
    norm_eps=1e-6, rope_theta=1e4, max_positions=64, tie_embeddings=False, qkv_bias=True, qk_norm=False,
    vocab_multiple=16,
)  # fmt: skip


def test_new_parameters_start_as_the_released_code_starts_them(tmp_path):
    save_tiny(tmp_path, "qwen2")
    model = model_of(tmp_path)
    state = filled(model, str(tmp_path))
    mixer = "decoder.layers.2.self_attention."
    for name, fan in (("gate_down", 16 + 48), ("gate_up", 24 + 16)):
        weight, bound = state[f"{mixer}{name}.weight"], 2**-2.5 * math.sqrt(6 / fan)
        assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound
        assert abs(weight.std().item() - bound / math.sqrt(3)) < 0.06 * bound
    assert not state[f"{mixer}gate_up.bias"].any()
    assert torch.equal(state[f"{mixer}out_norm.weight"], torch.ones(4))
    assert new_parameters(model) == {
        f"decoder.layers.{i}.self_attention.{leaf}"
        for i in (0, 2)
        for leaf in ("gate_down.weight", "gate_up.weight", "gate_up.bias", "out_norm.weight")
    }


def test_scratch_start():
    state = filled(SCRATCH, "")
    for name, tensor in state.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert abs(tensor[: SCRATCH.vocab_size].std().item() - 0.02) < 0.004, name
    assert not state["output_layer.weight"][70:].any()
    weights = [tensor.flatten()[:50] for name, tensor in state.items() if "mlp" in name and "norm" not in name]
    assert len({tuple(weight.tolist()) for weight in weights}) == len(weights)


def test_drawn_weights_depend_on_the_seed_and_not_on_the_padding():
    state = filled(SCRATCH, "", seed=3)
    assert not torch.equal(state["output_layer.weight"], filled(SCRATCH, "", seed=4)["output_layer.weight"])
    padded = filled(dataclasses.replace(SCRATCH, vocab_multiple=128), "", seed=3)
    assert torch.equal(padded["output_layer.weight"][:70], state["output_layer.weight"][:70])


@pytest.mark.parametrize("path", ["", "teacher"])
def test_drawn_weights_do_not_depend_on_the_layout(tmp_path, path):
    model = SCRATCH
    if path:
        save_tiny(tmp_path, "qwen3")
        model, path = model_of(tmp_path), str(tmp_path)
    whole = filled(model, path, seed=5)
    for rank in (0, 1):
        for name, tensor in filled(model, path, seed=5, tp_rank=rank, tp=2).items():
            assert torch.equal(tensor, local_shard(name, whole[name], tp_rank=rank, tp=2)), name
    last_stage = {name: torch.empty_like(t) for name, t in whole.items() if ".3." in name or "final" in name}
    fill(last_stage, model=model, path=path, seed=5)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in last_stage.items())


@pytest.mark.parametrize("path", ["", "teacher"])
def test_last_stage_of_a_tied_model_holds_a_copy_of_the_embedding(tmp_path, path):
    save_tiny(tmp_path, "qwen2_tied")
    model, path = model_of(tmp_path), str(tmp_path) if path else ""
    embedding = filled(model, path)["embedding.word_embeddings.weight"]
    stage = {"output_layer.weight": torch.empty_like(embedding)}
    fill(stage, model=model, path=path, seed=0)
    assert torch.equal(stage["output_layer.weight"], embedding)


def test_sharded_checkpoints_and_other_dtypes_read_the_same(tmp_path):
    teacher = save_tiny(tmp_path / "one", "qwen2", dtype=torch.bfloat16)
    teacher.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    model = model_of(tmp_path / "one")
    one, many = (filled(model, str(tmp_path / name), tp_rank=1, tp=2) for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def _rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _expect(folder: Path, message: str, **fields) -> None:
    model = dataclasses.replace(model_of(folder), **fields)
    with pytest.raises(ValueError, match=message) as caught:
        filled(model, str(folder))
    assert "\n" not in str(caught.value)


def test_missing_tensor(tmp_path):
    save_tiny(tmp_path, "qwen2")
    _rewrite(tmp_path, lambda state: state.pop("model.layers.1.self_attn.k_proj.bias"))
    _expect(tmp_path, r"holds no tensor model\.layers\.1\.self_attn\.k_proj\.bias \(1 missing\); check start\.path")


def test_unused_tensor(tmp_path):
    save_tiny(tmp_path, "qwen3")
    _expect(tmp_path, r"holds tensor model\.layers\.0\.self_attn\.k_norm\.weight, which .*qk_norm", qk_norm=False)
    _expect(tmp_path, r"holds tensor model\.layers\.2\..*\(.* unused\); check model.num_layers", num_layers=2)


def test_rotary_tables_and_a_tied_output_are_left_behind(tmp_path):
    save_tiny(tmp_path, "qwen2_tied")
    extra = {"lm_head.weight": torch.zeros(128, 36), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    _rewrite(tmp_path, lambda state: state.update(extra))
    assert "output_layer.weight" not in filled(model_of(tmp_path), str(tmp_path))


def test_other_shape(tmp_path):
    save_tiny(tmp_path, "llama")
    _expect(tmp_path, r"mlp\.gate_proj\.weight has shape \[42, 36\] .* needs \[48, 36\]; make model", ffn_size=48)
    _expect(tmp_path, r"model\.embed_tokens\.weight has shape \[77, 36\] .* needs \[78, 36\]", vocab_size=78)


def test_parameters_of_another_model():
    good = {row.name: torch.empty(row.shape) for row in table(SCRATCH)}
    bias = "decoder.layers.1.self_attention.linear_qkv.bias"
    with pytest.raises(ValueError, match=r"linear_qkv\.bias is not in the conversion table"):
        fill(dict(good), model=dataclasses.replace(SCRATCH, qkv_bias=False, pattern="S"), path="", seed=0)
    with pytest.raises(ValueError, match=f"built without parameter {bias}"):
        fill({name: t for name, t in good.items() if name != bias}, model=SCRATCH, path="", seed=0)
    with pytest.raises(ValueError, match=r"output_layer.weight has shape \[80, 24\], tp 2 of it is \[40, 24\]"):
        fill({"output_layer.weight": good["output_layer.weight"]}, model=SCRATCH, path="", seed=0, tp=2)


_MEASURE = """
import sys, resource
import torch
torch.set_num_threads(1)
from sbtrain.config.hf_shape import read_shape
from sbtrain.config.schema import ModelConfig
from sbtrain.convert.mapping import Part
from sbtrain.convert.start import fill
from sbtrain.convert.weights import table

folder, tp = sys.argv[1], int(sys.argv[2])
model = ModelConfig(pattern="LS", **read_shape(folder))
rows = table(model)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def empty(row):
    return torch.empty(row.local_shape(Part(tp=tp)), dtype=torch.bfloat16)
warm = {row.name: empty(row) for row in rows if "final" in row.name}
fill(warm, model=model, path=folder, seed=0, tp_rank=0, tp=tp)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = resident()
shard = {row.name: empty(row) for row in rows}
fill(shard, model=model, path=folder, seed=0, tp_rank=tp - 1, tp=tp)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
largest = max(s.shape[0] * s.shape[-1] * 2 for row in rows for s in row.sources)
print(peak - before, sum(tensor.nbytes for tensor in shard.values()), largest)
"""


@pytest.mark.parametrize("tp", [1, 2])
def test_peak_memory_is_the_shard_and_four_source_tensors(tmp_path, tp):
    """Resident memory of a fresh process, mapped file pages included, against a checkpoint of over 100 MB."""
    config = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 16,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1536, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = table(model_of(tmp_path))
    state = {s.name: torch.ones(s.shape, dtype=torch.bfloat16) for row in rows if not row.new for s in row.sources}
    save_file(state, tmp_path / "model.safetensors")
    del state
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), str(tp)], cwd=root, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    peak, shard, largest = (int(number) for number in done.stdout.split())
    print(f"peak {peak / 1e6:.1f} MB, shard {shard / 1e6:.1f} MB, largest source {largest / 1e6:.1f} MB")
    assert shard * tp >= 100e6 and shard <= peak <= shard + 4 * largest
