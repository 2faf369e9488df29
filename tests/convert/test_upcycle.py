"""Pairs, meta tokens and experts from a dense checkpoint: who inherits what, and that the experts add up to the FFN."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sbtrain.config.model_schema import (
    FeatureMap,
    Gate,
    GLAConfig,
    MetaConfig,
    ModelConfig,
    MoEConfig,
    PairConfig,
    RouterScore,
)
from sbtrain.convert.mapping import WHOLE, Part
from sbtrain.convert.start import check_source, fill, new_parameters, rows_of
from sbtrain.convert.upcycle import alpha_of
from sbtrain.convert.weights import inherited, table
from tiny_checkpoints import model_of, save_tiny

HYBRID = dict(
    pattern="(LS)(LF):mL:mF",
    gla=GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied, out_norm_init=0.5),
    meta=MetaConfig(num_tokens=6, init_std=0.03),
    moe=MoEConfig(num_experts=4, router_init_std=0.01),
)


def hybrid(folder, **changes) -> ModelConfig:
    return dataclasses.replace(model_of(folder), **{**HYBRID, **changes})


def filled(model: ModelConfig, path: str, part: Part = WHOLE, *, seed: int = 0, **how) -> dict[str, torch.Tensor]:
    """What one rank of a layout holds; what fill misses stays NaN."""
    local = {row.name: torch.full(row.local_shape(part), math.nan) for row in table(model)}
    fill(local, model=model, path=path, seed=seed, **dataclasses.asdict(part), **how)
    return local


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2")
    save_tiny(folder, "qwen2")
    return folder


def _mixer_names(model: ModelConfig, layer: int) -> set[str]:
    prefix = f"decoder.layers.{layer}.self_attention."
    return {row.name.removeprefix(prefix) for row in table(model) if row.name.startswith(prefix)}


def test_names_of_pairs_are_the_contract(teacher):
    own = {"linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight"}
    norms = {f"merge_norms.{symbol}.weight" for symbol in "LS"}
    separate = {f"branches.{symbol}.{name}" for symbol in "LS" for name in own} | {"branches.L.out_norm.weight"}
    assert _mixer_names(hybrid(teacher), 0) == separate | norms
    shared = hybrid(teacher, pair=PairConfig(shared_projections=True))
    assert _mixer_names(shared, 0) == own | {"branches.L.out_norm.weight"} | norms
    low_rank = dataclasses.replace(shared, gla=GLAConfig())
    gates = {f"branches.L.{name}" for name in ("gate_down.weight", "gate_up.weight", "gate_up.bias")}
    assert _mixer_names(low_rank, 0) == _mixer_names(shared, 0) | gates


@pytest.mark.parametrize("shared", [False, True])
def test_both_mixers_inherit_the_same_projections(teacher, shared):
    model = hybrid(teacher, pair=PairConfig(shared_projections=shared))
    state = filled(model, str(teacher), merge_norms={0: 0.25})
    plain = filled(model_of(teacher, pattern="F"), str(teacher))
    mixer = "decoder.layers.0.self_attention."
    for leaf in ("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight"):
        for prefix in [""] if shared else ["branches.L.", "branches.S."]:
            assert torch.equal(state[f"{mixer}{prefix}{leaf}"], plain[mixer + leaf])
    assert torch.equal(state[mixer + "merge_norms.S.weight"], torch.full((48,), 0.25))
    assert torch.equal(state["decoder.layers.1.self_attention.merge_norms.F.weight"], torch.ones(48))
    assert torch.equal(state[mixer + "branches.L.out_norm.weight"], torch.full((4,), 0.5))
    meta = state["embedding.meta_tokens"]
    assert meta.shape == (6, 48) and abs(meta.std().item() - 0.03) < 0.004
    added = {name.split("decoder.layers.")[-1] for name in new_parameters(model)}
    assert {"embedding.meta_tokens", "1.mlp.router.weight", "0.self_attention.merge_norms.L.weight"} <= added
    assert not any("experts" in name or "linear" in name for name in added)


def test_qk_norms_stay_with_the_softmax_mixer(tmp_path):
    save_tiny(tmp_path, "qwen3")
    model = hybrid(tmp_path)
    state, theirs = filled(model, str(tmp_path)), load_file(tmp_path / "model.safetensors")
    assert torch.equal(
        state["decoder.layers.0.self_attention.branches.S.q_norm.weight"],
        theirs["model.layers.0.self_attn.q_norm.weight"],
    )
    assert "decoder.layers.0.self_attention.branches.L.q_norm.weight" not in state


@pytest.mark.parametrize("shared_experts", [0, 1, 2])
def test_every_expert_is_the_dense_ffn_times_alpha(teacher, shared_experts):
    moe = MoEConfig(num_experts=4, num_shared_experts=shared_experts)
    state, theirs = filled(hybrid(teacher, moe=moe), str(teacher)), load_file(teacher / "model.safetensors")
    gate, up, down = (
        theirs[f"model.layers.1.mlp.{name}_proj.weight"] * alpha_of(moe) for name in ("gate", "up", "down")
    )
    mlp = "decoder.layers.1.mlp."
    for expert in range(4):
        assert torch.equal(state[mlp + "experts.linear_fc1"][expert], torch.cat([gate, up]))
        assert torch.equal(state[mlp + "experts.linear_fc2"][expert], down)
    if shared_experts:
        fc1, fc2 = (state[f"{mlp}shared_experts.linear_fc{i}.weight"] for i in (1, 2))
        assert torch.equal(fc1, torch.cat([gate] * shared_experts + [up] * shared_experts))
        assert torch.equal(fc2, torch.cat([down] * shared_experts, 1))
    assert "decoder.layers.0.mlp.linear_fc1.weight" in state
    router = state[mlp + "router.weight"]
    assert router.shape == (4, 48) and abs(router.std().item() - 0.001) < 0.00015


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({}, 1 + 1 / 16),  # the report's: alpha 0.98
        ({"top_k": 2}, 1 + 2 / 16),
        ({"num_shared_experts": 0, "top_k": 2}, 2 / 16),
        ({"top_k": 2, "renormalize": True}, 2),
        ({"score": RouterScore.sigmoid}, 1.5),
        ({"score": RouterScore.sigmoid, "top_k": 2, "renormalize": True}, 2),
    ],
)
def test_alpha(changes, total):
    assert alpha_of(MoEConfig(**changes)) == pytest.approx(total ** (-1 / 3), rel=1e-12)
    if not changes:
        assert alpha_of(MoEConfig()) == pytest.approx(0.97999, abs=1e-5)


def _moe_output(x, state, moe: MoEConfig, mlp: str) -> torch.Tensor:
    """A mixture of experts in plain torch, token by token, fp64."""
    weights = {name.removeprefix(mlp): tensor.double() for name, tensor in state.items() if name.startswith(mlp)}

    def ffn(fc1, fc2, token):
        gate, up = (fc1 @ token).chunk(2)
        return fc2 @ (F.silu(gate) * up)

    outputs = []
    for token in x:
        logits = weights["router.weight"] @ token
        scores = logits.softmax(0) if moe.score is RouterScore.softmax else logits.sigmoid()
        chosen = scores.topk(moe.top_k)
        values = chosen.values / chosen.values.sum() if moe.renormalize else chosen.values
        out = ffn(weights["shared_experts.linear_fc1.weight"], weights["shared_experts.linear_fc2.weight"], token)
        for value, j in zip(values, chosen.indices.tolist()):
            out = out + value * ffn(weights["experts.linear_fc1"][j], weights["experts.linear_fc2"][j], token)
        outputs.append(out)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        (MoEConfig(), 0.007),  # architectures' check of the report's factor
        (MoEConfig(top_k=2, renormalize=True), 0.1),  # alpha 0.79: silu shows
        (MoEConfig(score=RouterScore.sigmoid), 0.06),
    ],
    ids=["report", "renormalized", "sigmoid"],
)
def test_the_upcycled_ffn_puts_out_what_the_dense_one_does(tmp_path, moe, expected):
    """Unit-variance inputs and pre-activations, as in the estimate of 0.7 %."""
    save_tiny(tmp_path, "qwen2")
    theirs = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in theirs.items():
        if "mlp" in name:
            tensor.normal_(0, tensor.shape[1] ** -0.5, generator=generator)
    from safetensors.torch import save_file

    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = filled(hybrid(tmp_path, moe=moe), str(tmp_path))
    x = torch.randn(200, 48, dtype=torch.float64, generator=generator)
    gate, up, down = (theirs[f"model.layers.1.mlp.{name}_proj.weight"].double() for name in ("gate", "up", "down"))
    dense = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    error = (_moe_output(x, state, moe, "decoder.layers.1.mlp.") - dense).norm() / dense.norm()
    print(f"relative error {error:.4f}")
    assert error < 1.25 * expected


@pytest.mark.parametrize("path", ["", "teacher"])
def test_shards_are_parts_of_the_whole(teacher, path):
    model, path = hybrid(teacher, moe=MoEConfig(num_experts=4, num_shared_experts=2)), str(teacher) if path else ""
    whole = filled(model, path, seed=5)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    for rank in range(2):
        part = Part(tp_rank=rank, tp=2, ep_rank=1 - rank, ep=2)
        for name, tensor in filled(model, path, part, seed=5).items():
            if ".experts." in name:
                expected = whole[name].chunk(2)[1 - rank]
            elif name.endswith("fc1.weight"):
                expected = torch.cat([half.chunk(2)[rank] for half in whole[name].chunk(2)])
            elif name.endswith(("fc2.weight", "proj.weight")):
                expected = whole[name].chunk(2, 1)[rank]
            elif name.endswith(("qkv.weight", "qkv.bias", "embeddings.weight", "output_layer.weight")):
                expected = whole[name].chunk(2)[rank]
            else:
                expected = whole[name]
            assert torch.equal(tensor, expected), name
    if not path:
        assert not torch.equal(*whole["decoder.layers.1.mlp.experts.linear_fc1"][:2])


def test_merge_norms_of_shared_projections_are_cut_with_the_heads(teacher):
    model = hybrid(teacher, pair=PairConfig(shared_projections=True))
    rows = {row.name: row for row in table(model)}
    norm = rows["decoder.layers.0.self_attention.merge_norms.L.weight"]
    assert norm.local_shape(Part(tp=2)) == (24,)
    assert rows["decoder.layers.1.mlp.experts.linear_fc2"].local_shape(Part(tp=2, ep=4)) == (1, 48, 72)


def test_a_rank_reads_its_own_experts_alone(teacher):
    """From an export: the tensors of other ranks' experts are never opened."""
    model, opened = hybrid(teacher), []

    class Reader:
        def shape(self, name):
            return next(s.shape for row in table(model) for s in row.sources if s.name == name)

        def get(self, name):
            opened.append(name)
            return torch.zeros(self.shape(name))

    row = rows_of(model, inherits=False)["decoder.layers.1.mlp.experts.linear_fc1"]
    row.copy_into(torch.empty(2, 144, 48), Reader(), Part(ep_rank=1, ep=2))
    assert opened == [f"model.layers.1.mlp.experts.{j}.{half}_proj.weight" for j in (2, 3) for half in ("gate", "up")]


def test_refusals(teacher):
    model = hybrid(teacher, moe=MoEConfig(num_experts=4, expert_ffn_size=36))
    with pytest.raises(ValueError, match=r"model.moe.expert_ffn_size=36 is not the dense FFN's 72.*null$"):
        check_source(str(teacher), model=model)
    assert filled(model, "")["decoder.layers.1.mlp.experts.linear_fc1"].shape == (4, 72, 48)
    with pytest.raises(ValueError, match=r"layout.ep 3 does not divide .*linear_fc1, shape \[4, 144, 48\]"):
        filled(hybrid(teacher), str(teacher), Part(ep=3))


def test_every_tensor_of_the_source_is_read(teacher):
    names = {source.name for row in inherited(hybrid(teacher)) if not row.new for source in row.sources}
    assert names == set(load_file(teacher / "model.safetensors"))
