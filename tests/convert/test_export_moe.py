"""The sbtrain_moe format: transformers runs it and agrees with plain torch, and it comes back as it was."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import Documents, positions_of, with_bounds
from plain_model import plain_logits
from sbtrain.config.hf_shape import complete_shape
from sbtrain.config.model_schema import (
    FeatureMap,
    Gate,
    GLAConfig,
    MergePlace,
    MetaConfig,
    MetaPositions,
    ModelConfig,
    MoEConfig,
    PairConfig,
    RopeScaling,
    RouterScore,
)
from sbtrain.convert.export import export
from sbtrain.convert.exported import read_model
from sbtrain.convert.mapping import Fill, Part, Vocab
from sbtrain.convert.start import check_source, fill
from sbtrain.convert.weights import table
from sbtrain.inference.load import Where, load_model
from tiny_checkpoints import DictReader
from tiny_corpus import write_tokenizer

TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
SEPARATE = ModelConfig(
    pattern="(LS):m(LF)L:m(LS)", vocab_size=90, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
    ffn_size=40, norm_eps=1e-6, rope_theta=1e4, max_positions=512, tie_embeddings=False, qkv_bias=True, qk_norm=False,
    window=7, vocab_multiple=64, gla=TIED, meta=MetaConfig(num_tokens=5), moe=MoEConfig(num_experts=4),
)  # fmt: skip
MODELS = {
    "separate": SEPARATE,
    "shared": dataclasses.replace(
        SEPARATE, pair=PairConfig(shared_projections=True), moe=MoEConfig(num_experts=3, top_k=2, renormalize=True)
    ),
    "own_gates": dataclasses.replace(
        SEPARATE, pair=PairConfig(norm_place=MergePlace.before_projection),
        gla=GLAConfig(gate_rank=3, gate_normalizer=4.0, rope=True), qk_norm=True, qkv_bias=False, tie_embeddings=True,
        meta=MetaConfig(num_tokens=5, positions=MetaPositions.unrotated, in_state=False),
        moe=MoEConfig(num_experts=4, top_k=2, num_shared_experts=0, expert_ffn_size=24, score=RouterScore.sigmoid),
    ),
    "no_meta": dataclasses.replace(
        SEPARATE, pattern="S:m(LS):m", meta=MetaConfig(), gla=dataclasses.replace(TIED, lower_bound=0.25),
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
        moe=MoEConfig(num_experts=4, num_shared_experts=2, score=RouterScore.sigmoid, bias_update_rate=0.01),
    ),
}  # fmt: skip


def random_state(model: ModelConfig, *, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator, state = torch.Generator().manual_seed(1), {}
    for row in table(model):
        scale = 0.5 if "embedding" in row.name or "router" in row.name else 0.15
        values = torch.randn(row.shape, generator=generator) * scale + (row.fill is Fill.norm)
        if isinstance(row, Vocab):
            values[model.vocab_size :] = 0
        state[row.name] = values.to(torch.float32 if row.buffer else dtype)
    return state


def _export(folder, model, *, dtype="fp32", **options):
    """The exported folder and the weights under the family's names, fp64."""
    state = random_state(model)
    assert export(DictReader(state), model=model, out=folder, dtype=dtype, **options) == "sbtrain_moe"
    named = (row.export(state[row.name]) for row in table(model))
    return {name: tensor.double() for part in named for name, tensor in part.items()}


def _load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.float32
    ).eval()


def _close(found, expected):
    difference = found.double() - expected
    assert difference.norm() < 1e-5 * expected.norm() and difference.abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_transformers_agrees_with_plain_torch_whole_and_in_pieces(tmp_path, name):
    """In pieces: prefill, then chunks that are longer and shorter than the window, then single tokens."""
    model = MODELS[name]
    state = _export(tmp_path / "out", model)
    student = _load(tmp_path / "out")
    tokens = torch.randint(0, model.vocab_size, (2, 60))
    with torch.no_grad():
        whole = student(tokens).logits
        cache, pieces = None, []
        for piece in tokens.split([20, 3, 10, 1, 1, 17, 1, 1, 6], 1):
            output = student(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    expected = plain_logits(state, model, tokens)
    _close(whole, expected)
    _close(torch.cat(pieces, 1), expected)


@pytest.mark.parametrize("name", MODELS)
def test_generate_with_and_without_cache_and_padding(tmp_path, name):
    model = MODELS[name]
    state = _export(tmp_path / "out", model)
    student = _load(tmp_path / "out")
    prompts = [torch.randint(0, model.vocab_size, (length,)) for length in (13, 4)]
    batch, mask = torch.full((2, 13), 5), torch.zeros(2, 13, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 13 - len(prompt) :], mask[row, 13 - len(prompt) :] = prompt, 1
    together = student.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 13:]
    for row, prompt in enumerate(prompts):
        expected = prompt
        for _ in range(6):
            following = plain_logits(state, model, expected)[-1].argmax(-1)
            expected = torch.cat([expected, following[None]])
        assert torch.equal(together[row], expected[len(prompt) :]), row
        uncached = student.generate(prompt[None], max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(uncached[0], expected)


def test_a_cache_that_is_empty_begins_with_the_meta_tokens(tmp_path):
    _export(tmp_path / "out", SEPARATE)
    student = _load(tmp_path / "out")
    tokens = torch.randint(0, 90, (1, 9))
    with torch.no_grad():
        empty = type(student(tokens, use_cache=True).past_key_values)()
        assert torch.equal(student(tokens, past_key_values=empty).logits, student(tokens).logits)


def test_beam_search_and_training_run(tmp_path):
    _export(tmp_path / "out", SEPARATE)
    student = _load(tmp_path / "out")
    prompt = torch.randint(0, 90, (2, 40))
    how = dict(max_new_tokens=5, do_sample=False, num_beams=3)
    assert torch.equal(student.generate(prompt, **how), student.generate(prompt, **how, use_cache=False))
    student.train()(prompt, labels=prompt).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert student.model.meta_tokens.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_a_start_with_the_same_weights(tmp_path, name, dtype):
    model, kind = MODELS[name], {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    state = random_state(model, dtype=kind)
    export(DictReader(state), model=model, out=tmp_path / "out", dtype=dtype, max_shard_bytes=20_000)
    came_back = read_model(tmp_path / "out")
    assert came_back.moe.top_k == model.moe.top_k and came_back.meta.positions is model.meta.positions
    check_source(str(tmp_path / "out"), model=model)
    rows = table(model)
    local = {row.name: torch.full(row.shape, torch.nan, dtype=state[row.name].dtype) for row in rows}
    buffers = {row.name: local.pop(row.name) for row in rows if row.buffer}
    fill(local, model=model, path=str(tmp_path / "out"), seed=3, buffers=buffers)
    assert all(torch.equal(tensor, state[key]) for key, tensor in {**local, **buffers}.items())
    part = Part(ep_rank=1, ep=model.moe.num_experts)
    row = next(row for row in rows if row.name.endswith("experts.linear_fc1"))
    local = {row.name: torch.empty(row.local_shape(part), dtype=kind)}
    with pytest.raises(ValueError, match="built without parameter"):
        fill(local, model=model, path=str(tmp_path / "out"), seed=3, ep_rank=1, ep=part.ep)


@pytest.mark.parametrize("name", MODELS)
def test_our_model_gives_the_logits_that_transformers_gives(tmp_path, name):
    """The folder in both: read by sbtrain.inference into the model that trains, and by transformers."""
    model = dataclasses.replace(MODELS[name], vocab_size=270)
    _export(tmp_path / "out", model, tokenizer_dir=write_tokenizer(tmp_path / "tokenizer"))
    student = _load(tmp_path / "out")
    tokens = torch.randint(0, model.vocab_size, (40,))
    with Mesh.build(Layout()) as mesh, torch.no_grad():
        loaded = load_model(Where(model=str(tmp_path / "out"), precision="fp32"), mesh)
        whole = with_bounds([0, 40], mesh.device)
        ours = loaded.model(tokens, Documents(whole, positions_of(whole)))
        _close(ours.cpu(), student(tokens[None]).logits[0].double())


def test_names_of_the_format(tmp_path):
    _export(tmp_path / "out", SEPARATE)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    layer = "model.layers.0."
    assert {"model.meta_tokens", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    attention = {f"{x}_{y}_proj.weight" for x in ("la", "swa") for y in "qkvo"} | {
        f"{x}_{y}_proj.bias" for x in ("la", "swa") for y in "qkv"
    }
    attention |= {"la_merge_norm.weight", "swa_merge_norm.weight", "g_norm.weight"}
    assert {name.removeprefix(f"{layer}attn.") for name in names if name.startswith(f"{layer}attn.")} == attention
    experts = {f"experts.{j}.{y}_proj.weight" for j in range(4) for y in ("gate", "up", "down")}
    shared = {f"shared_expert.{y}_proj.weight" for y in ("gate", "up", "down")}
    mlp = {name.removeprefix(f"{layer}mlp.") for name in names if name.startswith(f"{layer}mlp.")}
    assert mlp == experts | shared | {"router.weight"}
    assert "model.layers.1.attn.fa_q_proj.weight" in names and "model.layers.2.attn.q_proj.weight" in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_kinds"] == ["(LS):m", "(LF)", "L:m", "(LS)"] and config["sliding_window"] == 7
    assert len(list((tmp_path / "out").glob("*_*.py"))) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "(LS)"}, r"model.pattern='\(LS\)' contradicts"),
        ({"window": 9}, "model.window=9 contradicts 7"),
        ({"gla": dataclasses.replace(TIED, lower_bound=0.5)}, "model.gla.lower_bound=0.5 contradicts 0.0"),
        ({"meta": MetaConfig(num_tokens=6)}, "model.meta.num_tokens=6 contradicts 5"),
        ({"moe": MoEConfig(num_experts=8)}, "model.moe.num_experts=8 contradicts 4"),
        ({"pair": PairConfig(shared_projections=True)}, "model.pair.shared_projections=True contradicts False"),
        ({"gla": dataclasses.replace(TIED, rope=True)}, "model.gla.rope=True contradicts False"),
        (
            {"pair": PairConfig(norm_place=MergePlace.before_projection)},
            "model.pair.norm_place=before_projection contradicts behind_projection",
        ),
        ({"hidden_size": 64}, "model.hidden_size=64 contradicts 32"),
    ],
)
def test_a_recipe_that_describes_another_model_is_refused(tmp_path, changes, message):
    _export(tmp_path / "out", SEPARATE)
    trained = dataclasses.replace(SEPARATE, moe=dataclasses.replace(SEPARATE.moe, aux_loss_coeff=0.1), max_positions=9)
    assert complete_shape(dataclasses.replace(trained, hidden_size=None), str(tmp_path / "out")) == trained
    with pytest.raises(ValueError, match=message) as error:
        complete_shape(dataclasses.replace(SEPARATE, **changes), str(tmp_path / "out"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("exported", "recipe"),
    [
        (SEPARATE, {"moe": dataclasses.replace(SEPARATE.moe, expert_ffn_size=40)}),  # the dense width, written out
        (SEPARATE, {"moe": dataclasses.replace(SEPARATE.moe, expert_ffn_size=40), "ffn_size": None}),
        (SEPARATE, {"gla": dataclasses.replace(TIED, gate_rank=3)}),  # a tied gate has no bottleneck
        (MODELS["no_meta"], {"meta": MetaConfig(positions=MetaPositions.unrotated, in_state=False)}),  # of no tokens
        (MODELS["no_meta"], {"moe": dataclasses.replace(MODELS["no_meta"].moe, bias_update_rate=0.002)}),
    ],
    ids=["width", "width_open", "rank", "meta", "rate"],
)
def test_a_recipe_that_says_the_same_otherwise_goes_on(tmp_path, exported, recipe):
    _export(tmp_path / "out", exported)
    recipe = dataclasses.replace(exported, **recipe)
    assert complete_shape(recipe, str(tmp_path / "out")) == dataclasses.replace(recipe, ffn_size=40)
    without = dataclasses.replace(MODELS["no_meta"], moe=dataclasses.replace(MODELS["no_meta"].moe, bias_update_rate=0))
    if exported is MODELS["no_meta"]:
        with pytest.raises(ValueError, match="model.moe.bias_update_rate=0 contradicts 0.01"):
            complete_shape(without, str(tmp_path / "out"))


def test_other_formats_refuse(tmp_path):
    for form, reason in (("sbtrain", "one mixer a layer"), ("gla_swa", "one mixer a layer")):
        with pytest.raises(ValueError, match=f"format={form}.* cannot hold this model, it has {reason}; use format=hf"):
            export(DictReader({}), model=SEPARATE, out=tmp_path / "out", format=form)
    assert list(tmp_path.iterdir()) == []


def test_the_balancing_bias_is_fp32_in_every_precision(tmp_path):
    """Rounded, it would choose other experts."""
    folder = tmp_path / "out"
    state = random_state(MODELS["no_meta"])
    exact = 0.01 + 1e-4 * torch.arange(4, dtype=torch.float32)
    for name in state:
        if name.endswith("router.expert_bias"):
            state[name] = exact
    export(DictReader(state), model=MODELS["no_meta"], out=folder, dtype="bf16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    for model in (loaded, loaded.to(torch.bfloat16), loaded.half()):
        biases = [tensor for name, tensor in model.named_buffers() if name.endswith("expert_bias")]
        assert biases and all(torch.equal(bias, exact) for bias in biases)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("num_experts", "6", "num_experts"),
        ("num_experts", 0, "num_experts"),
        ("num_experts_per_tok", 9, "top_k=9 exceeds"),
        ("num_meta_tokens", -1, "num_tokens"),
        ("router_bias_update_rate", "a", "."),
        ("sliding_window", None, "window"),
        ("num_key_value_heads", 3, "num_kv_heads=3 does not divide"),
        ("norm_topk_prob", "no", "renormalize"),
        ("moe_intermediate_size", 0, "expert_ffn_size=0"),
    ],
)
def test_configurations_of_no_model(tmp_path, key, value, said):
    export(DictReader(random_state(SEPARATE)), model=SEPARATE, out=tmp_path / "out", dtype="fp32")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"config.json does not describe a model .*{said}") as error:
        read_model(tmp_path / "out")
    assert "\n" not in str(error.value)
