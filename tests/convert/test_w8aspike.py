"""INT8 exports: what is in the folder, that it comes back, that transformers computes the same, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import Documents
from plain_model import plain_logits
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MetaConfig, ModelConfig, MoEConfig, PairConfig
from sbtrain.config.schema import Precision
from sbtrain.config.spiking_export import SCALES
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.convert.calibrated import Calibrated, MergedGates, Writer, fingerprint_of, int8_model, int8_names
from sbtrain.convert.export import export
from sbtrain.convert.export_config import choose_format
from sbtrain.convert.exported import copy_exported, fill_exported, read_model
from sbtrain.convert.mapping import Part
from sbtrain.convert.names import projection_of
from sbtrain.convert.weights import table
from sbtrain.model.build import build_model, global_parameters
from sbtrain.spiking.quantize import dequantize, group_scales, quantize
from sharding import global_state, hf_state
from tiny_checkpoints import DictReader

RELEASED = ModelConfig(
    pattern="LS", vocab_size=90, hidden_size=128, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16, ffn_size=128,
    norm_eps=1e-6, rope_theta=1e4, max_positions=512, tie_embeddings=False, qkv_bias=True, qk_norm=False, window=7,
    vocab_multiple=64,
)  # fmt: skip
SMALL = replace(RELEASED, hidden_size=32, head_dim=8, num_heads=4, ffn_size=40, gla=GLAConfig(gate_rank=5))
TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
GROUPS = SpikingConfig(weight_group=8)
MODELS = {
    "gla_swa": (RELEASED, SpikingConfig()),
    "gla_swa_no_bias_tied": (replace(RELEASED, qkv_bias=False, tie_embeddings=True), SpikingConfig()),
    "sbtrain_hybrid": (
        replace(SMALL, pattern="LFS", num_layers=3, qk_norm=True, tie_embeddings=True),
        replace(GROUPS, k=2.5, layer_k={1: 4.0}, skip={"gate": "all", "proj": "1-2"}, spike_down_proj=True),
    ),
    "sbtrain_hybrid_plain_attention": (SMALL, replace(GROUPS, queries=False, kv_int8=False)),
    "sbtrain_moe_pairs": (replace(SMALL, pattern="(LS)(LF)", qkv_bias=False, gla=TIED), GROUPS),
    "sbtrain_moe_shared_meta": (
        replace(SMALL, pattern="(LS)L", pair=PairConfig(shared_projections=True), meta=MetaConfig(num_tokens=3)), GROUPS
    ),
}  # fmt: skip
"""Model and what spikes, by the start of the folder's model_type."""


def calibrated(folder, model, spiking):
    """Weights rounded to nearest, as calibration leaves them."""
    int8, reader = int8_model(model, spiking), DictReader(global_state(model))
    merged = MergedGates(reader, model)
    with Writer(folder) as writer:
        for layer in range(model.num_layers):
            weights = {}
            for name in int8_names(int8):
                if projection_of(name)[1] == layer:
                    scales = group_scales(merged.get(name), int8.spiking.weight_group)
                    weights[name] = quantize(merged.get(name), scales), scales
            writer.add(layer, weights)
        writer.finish(int8, {"fingerprint": fingerprint_of(merged, int8)})
    return Calibrated(folder)


def exported(tmp_path, name, *, dtype="fp32", **options):
    """The folder of one of MODELS."""
    model, spiking = MODELS[name]
    weights = calibrated(tmp_path / "calibrated", model, spiking)
    reader = DictReader(global_state(model))
    export(reader, model=model, out=tmp_path / "out", dtype=dtype, format="w8aspike", calibrated=weights, **options)
    return tmp_path / "out"


def ours(folder, tokens, *, precision=Precision.fp32):
    """The engine's logits [T, vocab] of the folder's model, and the model's configuration."""
    config = read_model(folder)
    with Mesh.build(Layout()) as mesh, torch.no_grad():
        model = build_model(config, mesh, precision=precision, seq_len=64).eval()
        fill_exported(global_parameters(model), model=config, path=folder)
        whole = torch.tensor([0, len(tokens)], dtype=torch.int32)
        return model(tokens, Documents(whole, torch.arange(len(tokens)))), config


def theirs(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=dtype).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_comes_back_and_transformers_agrees(tmp_path, name):
    model, spiking = MODELS[name]
    folder, tokens = exported(tmp_path, name), torch.randint(0, 90, (75,), generator=torch.Generator().manual_seed(1))
    logits, config = ours(folder, tokens)
    int8 = int8_model(model, spiking)
    assert name.startswith(json.loads((folder / "config.json").read_text())["model_type"])
    assert (config.gla.gate, config.window) == (int8.gla.gate, model.window)
    for layer in range(model.num_layers):
        assert config.spiking.k_of(layer) == int8.spiking.k_of(layer)
        for projection in ("qkv", "gate", "proj", "gate_up", "down"):
            assert config.spiking.spikes(projection, layer) == int8.spiking.spikes(projection, layer)
    assert replace(config.spiking, k=3.0, layer_k={}, skip={}) == replace(int8.spiking, k=3.0, layer_k={}, skip={})
    student = theirs(folder)
    with torch.no_grad():
        assert_equal_but_for_flips(student(tokens[None]).logits[0], logits)
    assert_equal_but_for_flips(logits, plain(tmp_path, name, tokens))


def plain(tmp_path, name, tokens):
    """Logits of the calibrated weights in plain torch, float64."""
    model, spiking = MODELS[name]
    weights, state = Calibrated(tmp_path / "calibrated"), global_state(model)
    int8, merged = weights.model, MergedGates(DictReader(state), model)
    names = global_state(int8)
    whole = {key: dequantize(*weights.get(key)) if key in weights.names else merged.get(key) for key in names}
    state = {key: tensor.double() for key, tensor in hf_state(whole, int8).items()}
    return plain_logits(state, int8, tokens)


def assert_equal_but_for_flips(logits, expected):
    """Rounding of a single fp32 sum may flip a count; then a token, and those that see it, differ by a spike."""
    distance = (logits.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert distance.median() < 1e-5 and distance.max() < 0.3, distance


def test_the_folder_is_the_released_formats(tmp_path):
    folder = exported(tmp_path, "gla_swa", dtype="bf16")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["model_type"] == "gla_swa" and config["architectures"] == ["GLAswaForCausalLM"]
    assert config["quant_weight_group_size"] == 128 and config["spiking"]["int8_weights"]
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    for layer, kind in enumerate("LS"):
        own = {key.removeprefix(f"model.layers.{layer}."): t for key, t in tensors.items() if f"layers.{layer}." in key}
        wanted = {f"attn.{x}.weight" for x in attention} | {f"attn.{x}_proj.bias" for x in "qkv"}
        wanted |= {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")} | {"attn_norm.weight", "mlp_norm.weight"}
        wanted |= {"attn.gk_proj.weight", "attn.gk_proj.bias", "attn.g_norm.weight"} if kind == "L" else set()
        wanted |= {key.replace(".weight", SCALES) for key in wanted if "_proj.weight" in key}
        assert set(own) == wanted
        for key, weight in own.items():
            if key.endswith("_proj.weight"):
                scales = own[key.replace(".weight", SCALES)]
                assert scales.shape == (len(weight), weight.shape[1] // 128, 1) and scales.dtype == torch.float32
                if "down" in key:
                    assert (scales == 1).all() and not torch.equal(weight, weight.round())
                else:  # a fixed point, in bf16
                    assert torch.equal(dequantize(quantize(weight, scales), scales, torch.bfloat16), weight)


@pytest.mark.parametrize("name", ["gla_swa", "sbtrain_moe_pairs"])
def test_bf16_folders_keep_their_integers(tmp_path, name):
    """Also where transformers loads them in bf16, and where a user moves them about."""
    folder, weights = exported(tmp_path, name, dtype="bf16"), Calibrated(tmp_path / "calibrated")
    student = theirs(folder, torch.bfloat16).bfloat16()
    layer = student.model.layers[0].mlp.gate_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.weight_quantizer.scales.dtype == torch.float32
    integers, scales = weights.get("decoder.layers.0.mlp.linear_fc1.weight")
    half = len(integers) // 2
    assert torch.equal(quantize(layer.weight, layer.weight_quantizer.scales), integers[:half])
    assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
    tokens = torch.randint(0, 90, (40,), generator=torch.Generator().manual_seed(2))
    exact, rounded = (ours(folder, tokens, precision=kind)[0].float() for kind in (Precision.fp32, Precision.bf16))
    with torch.no_grad():
        difference = student(tokens[None]).logits[0].float() - exact
    assert difference.norm() < 2 * (rounded - exact).norm()  # as far as bf16 itself


def test_gradients_in_transformers_pass_straight_through(tmp_path):
    """Rounded activations, keys, values and weights hand theirs on; so the model can be trained on."""
    folder, tokens = exported(tmp_path, "gla_swa"), torch.randint(0, 90, (1, 30))
    student = theirs(folder)
    layer = student.model.layers[0].mlp.gate_proj
    module, x = sys.modules[type(layer).__module__], torch.randn(3, 8, requires_grad=True)
    for rounded in (module.spikes(x, 3.0), module.int8_tokens(x)):
        upstream, plain = torch.randn_like(rounded), rounded.detach()
        assert torch.equal(torch.autograd.grad(rounded, x, upstream)[0], upstream) and not torch.equal(plain, x)
    with torch.no_grad():
        assert torch.equal(plain, module.int8_tokens(x))
        expected = student(tokens).logits
    found = student(tokens, labels=tokens)
    assert torch.equal(found.logits.detach(), expected)
    found.loss.backward()
    without = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, without


@pytest.mark.parametrize("name", ["gla_swa", "sbtrain_hybrid", "sbtrain_moe_shared_meta"])
def test_cached_pieces_equal_the_whole(tmp_path, name):
    student, tokens = theirs(exported(tmp_path, name)), torch.randint(0, 90, (2, 40))
    with torch.no_grad():
        whole, cache, pieces = student(tokens).logits, None, []
        for piece in tokens.split([20, 3, 1, 1, 10, 5], 1):
            output = student(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert_equal_but_for_flips(torch.cat(pieces, 1).flatten(0, 1), whole.flatten(0, 1))


def test_a_model_of_no_memory_gets_some(tmp_path):
    """As tools do that build on the meta device and fill in what they have read."""
    folder = exported(tmp_path, "gla_swa")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        student = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    student.to_empty(device="cpu")
    student.load_state_dict(theirs(folder).state_dict())
    tokens = torch.randint(0, 90, (1, 30))
    with torch.no_grad():
        assert torch.equal(student.eval()(tokens).logits, theirs(folder)(tokens).logits)


def test_the_released_folder_is_recognized_by_its_tensors(tmp_path):
    """Its config.json says nothing of spikes; its weights may stand beside their grid."""
    folder = exported(tmp_path, "gla_swa", max_shard_bytes=200_000)
    tokens = torch.randint(0, 90, (30,))
    expected, config = ours(folder, tokens)
    values = json.loads((folder / "config.json").read_text())
    for key in ("spiking", "gate_full_rank", "quant_weight_group_size"):
        del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    assert read_model(folder) == config and config.gla.gate is Gate.full_rank and config.spiking.enabled
    name, files = "model.layers.0.attn.q_proj", sorted(folder.glob("*.safetensors"))
    (shard,) = [path for path in files if f"{name}.weight" in load_file(path)]
    (scales,) = [found[name + SCALES] for found in map(load_file, files) if name + SCALES in found]
    tensors = load_file(shard)
    tensors[f"{name}.weight"] += 0.3 * scales.expand(-1, -1, 128).flatten(1)
    save_file(tensors, shard)
    assert torch.equal(ours(folder, tokens)[0], expected)


def test_float_models_that_spike_are_exported_as_such(tmp_path):
    """format=hf: spikes, and no INT8 weights; experts too."""
    spiking = SpikingConfig(enabled=True, spike_down_proj=True, k=2.0)
    moe = MoEConfig(num_experts=4, top_k=2, num_shared_experts=1, expert_ffn_size=24)
    for kind, model in {
        "sbtrain_hybrid": replace(SMALL, spiking=spiking),
        "sbtrain_moe": replace(SMALL, pattern="(LS):mS", moe=moe, spiking=spiking),
    }.items():
        folder, tokens = tmp_path / kind, torch.randint(0, 90, (50,))
        export(DictReader(global_state(model)), model=model, out=folder, dtype="fp32")
        assert json.loads((folder / "config.json").read_text())["model_type"] == kind
        logits, config = ours(folder, tokens)
        assert config.spiking == spiking
        with torch.no_grad():
            assert_equal_but_for_flips(theirs(folder)(tokens[None]).logits[0], logits)


@pytest.mark.parametrize(
    "name, dim", [("self_attention.linear_proj", 1), ("self_attention.linear_qkv", 0), ("self_attention.gate", 0)]
)
def test_a_rank_reads_its_part(tmp_path, name, dim):
    """Rows and columns are rounded with their own scales."""
    folder, name = exported(tmp_path, "sbtrain_hybrid_plain_attention"), f"decoder.layers.0.{name}.weight"
    row = next(row for row in table(read_model(folder)) if row.name == name)
    whole = dequantize(*Calibrated(tmp_path / "calibrated").get(name))
    for rank in range(2):
        part = torch.empty(row.local_shape(Part(tp_rank=rank, tp=2)))
        copy_exported(
            {name: part}, {row.name: row for row in table(read_model(folder))}, path=folder, part=Part(rank, 2)
        )
        assert torch.equal(part, whole.chunk(2, dim)[rank])


def damage(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "model.layers.0.attn.q_proj"
DAMAGES = {
    "positive numbers": lambda t: t[Q + SCALES].fill_(-1.0),
    "not positive numbers": lambda t: t[Q + SCALES].fill_(float("nan")),
    "holds no tensor": lambda t: t.pop(Q + SCALES),
    "in groups of 128": lambda t: t.update({Q + SCALES: torch.ones(128, 2, 1)}),
    "no place": lambda t: t.update({Q + ".weight_quantizer.zeros": torch.ones(1)}),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damaged_folders(tmp_path, reason):
    folder = exported(tmp_path, "gla_swa")
    damage(folder / "model.safetensors", DAMAGES[reason])
    with pytest.raises(ValueError, match=reason) as error:
        ours(folder, torch.arange(5))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [("k", -1), ("k", "3"), ("weight_group", 0), ("queries", 1), ("skip", {"q": [0]}), ("skip", {"qkv": [9]})],
)
def test_damaged_configurations(tmp_path, key, value):
    folder = exported(tmp_path, "gla_swa")
    values = json.loads((folder / "config.json").read_text())
    values["spiking"][key] = value
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"does not describe a model .*spiking.{key}"):
        read_model(folder)


def test_damaged_calibrations(tmp_path):
    model, spiking = MODELS["gla_swa"]
    good = calibrated(tmp_path / "good", model, spiking).folder
    name = "decoder.layers.0.self_attention.linear_qkv.weight"

    def copy(change):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad)
        return bad

    def bits(folder):
        damage(folder / "layer_00000.safetensors", lambda t: t[name][0].neg_())

    def half(folder):
        path = folder / "layer_00000.safetensors"
        path.write_bytes(path.read_bytes()[:1000])

    def document(**changes):
        def change(folder):
            values = json.loads((folder / "calibration.json").read_text())
            (folder / "calibration.json").write_text(json.dumps({**values, **changes}))

        return change

    for change in (bits, half):
        with pytest.raises(ValueError, match="calibrate again"):
            Calibrated(copy(change)).get(name)
    for change in (document(version=1), document(model={"pattern": 3}), document(checksums=4), document(model=[])):
        with pytest.raises(ValueError, match="none of this version's .*calibrate again"):
            Calibrated(copy(change))
    with pytest.raises(ValueError, match="holds no calibrated weights"):
        Calibrated(tmp_path)


def test_calibrations_of_other_models_and_weights(tmp_path):
    model, spiking = MODELS["gla_swa"]
    weights, reader = calibrated(tmp_path / "calibrated", model, spiking), DictReader(global_state(model))
    about = dict(out=tmp_path / "out", format="w8aspike", calibrated=weights)
    with pytest.raises(ValueError, match="of other weights than this checkpoint's"):
        export(DictReader(global_state(model, seed=1)), model=model, **about)
    name = weights.names[-1]
    with pytest.raises(ValueError, match="of other weights than this checkpoint's"):  # norms alone would not tell
        export(DictReader({**global_state(model), name: 2 * reader.get(name)}), model=model, **about)
    with pytest.raises(ValueError, match="of another model than this"):
        export(reader, model=replace(model, window=8), **about)
    with pytest.raises(ValueError, match="needs calibrated weights"):
        export(reader, model=model, **{**about, "calibrated": None})
    assert not (tmp_path / "out").exists()
    longer = replace(model, max_positions=4096)
    export(reader, model=longer, **about)
    assert read_model(tmp_path / "out").max_positions == 4096


def test_fp16_that_cannot_hold_the_integers(tmp_path):
    model, spiking = MODELS["gla_swa"]
    state = {
        name: tensor * (1e-7 if "linear_qkv.weight" in name else 1) for name, tensor in global_state(model).items()
    }
    int8 = int8_model(model, spiking)
    merged = MergedGates(DictReader(state), model)
    with Writer(tmp_path / "calibrated") as writer:
        for layer in range(2):
            own = [name for name in int8_names(int8) if projection_of(name)[1] == layer]
            scales = {name: group_scales(merged.get(name), 128) for name in own}
            writer.add(layer, {name: (quantize(merged.get(name), scales[name]), scales[name]) for name in own})
        writer.finish(int8, {"fingerprint": fingerprint_of(merged, int8)})
    about = dict(model=model, out=tmp_path / "out", format="w8aspike", calibrated=Calibrated(tmp_path / "calibrated"))
    with pytest.raises(ValueError, match="dtype=float16 cannot hold the INT8 weight .*; use bf16"):
        export(DictReader(state), dtype="fp16", **about)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_computes_the_same_is_written_as_released():
    same = [{"skip": {"down": "all"}}, {"skip": {"down": "0-1"}, "spike_down_proj": True}, {"warm_in_tokens": 9}]
    same.append({"k": 2.0, "layer_k": {0: 3.0, 1: 3.0}})
    other = [{"skip": {"down": "0"}, "spike_down_proj": True}, {"skip": {"proj": "0"}}, {"k": 2.0, "layer_k": {0: 3.0}}]
    for form, all_changes in {"gla_swa": same, "sbtrain": [*other, {"weight_group": 64}, {"kv_int8": False}]}.items():
        for changes in all_changes:
            assert choose_format("w8aspike", int8_model(RELEASED, SpikingConfig(**changes))) == form, changes


def test_what_has_no_int8_weights():
    with pytest.raises(ValueError, match="model.pattern: layer 1 is a mixture of experts, which are not calibrated"):
        int8_names(int8_model(replace(SMALL, pattern="LS:m"), GROUPS))
    with pytest.raises(ValueError, match="weight_group=64 does not divide the 32 input channels of projection qkv"):
        int8_names(int8_model(SMALL, replace(GROUPS, weight_group=64)))
