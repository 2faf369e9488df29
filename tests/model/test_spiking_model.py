"""Models that spike against plain torch in float64: logits, and gradients that pass straight through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from exact_case import exact_chunks, exact_step
from logits_case import as_row, forward_rows
from parallel.layout import Layout
from parallel.mesh import Mesh
from plain_model import plain_logits
from sbtrain.config.model_schema import (
    FeatureMap,
    Gate,
    GLAConfig,
    MergePlace,
    MetaConfig,
    ModelConfig,
    MoEConfig,
    PairConfig,
)
from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.config.schema import Precision, Recompute
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.model.build import build_model
from sbtrain.spiking.neuron import neurons, set_share
from sharding import global_state, hf_state

ALL = SpikingConfig(enabled=True, spike_down_proj=True)
TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
BASE = ModelConfig(
    pattern="LSF", vocab_size=90, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
    norm_eps=1e-5, rope_theta=1e4, max_positions=256, tie_embeddings=False, qkv_bias=True, qk_norm=False, window=7,
    gla=GLAConfig(gate_rank=4), vocab_multiple=32, spiking=ALL,
)  # fmt: skip
PAIRS = dict(pattern="(LS)(LF)", num_layers=2, gla=TIED)
MODELS = {
    "all": BASE,
    "as_released": replace(BASE, pattern="LS", num_layers=2, spiking=SpikingConfig(enabled=True)),
    "qk_norm_other_k": replace(BASE, qk_norm=True, spiking=replace(ALL, k=2.0, layer_k={0: 4.5, 2: 1.0})),
    "gate_alone": replace(BASE, spiking=replace(ALL, skip={"qkv": "0", "proj": "all", "gate_up": "1-2"})),
    "all_but_the_gate": replace(BASE, spiking=replace(ALL, skip={"gate": "all", "down": "0,2"}, kv_int8=False)),
    "no_queries": replace(BASE, spiking=replace(ALL, queries=False)),
    "pairs": replace(BASE, **PAIRS),
    "pairs_shared_low_rank": replace(BASE, **{**PAIRS, "gla": BASE.gla}, pair=PairConfig(shared_projections=True)),
    "pairs_normed_before": replace(BASE, **PAIRS, pair=PairConfig(norm_place=MergePlace.before_projection)),
    "meta": replace(BASE, meta=MetaConfig(num_tokens=5)),
    "experts": replace(BASE, pattern="L:mS", num_layers=2, moe=MoEConfig(num_experts=4, top_k=2, aux_loss_coeff=0.0)),
}
BOUNDS = torch.tensor([0, 1, 14, 14, 31, 40], dtype=torch.int32)


def packed_row():
    return as_row(torch.randint(0, 90, (40,), generator=torch.Generator().manual_seed(5)), BOUNDS)


def plain_step(model: ModelConfig, row, share: float) -> tuple[float, dict]:
    """Mean loss and gradients by global name."""
    state = {name: x.requires_grad_() for name, x in global_state(model, dtype=torch.float64).items()}
    logits = plain_logits(hf_state(state, model), model, row.tokens, row.cu_seqlens, share)
    loss = torch.nn.functional.cross_entropy(logits, row.labels)
    loss.backward()
    return float(loss), {name: x.grad for name, x in state.items()}


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_plain_torch(name, share):
    """Every count is the same, and every gradient skips them."""
    model, row = MODELS[name], packed_row()
    found, (loss, grads) = exact_step(0, Layout(), model, [row], share=share), plain_step(model, row, share)
    rel = 1e-9
    assert found["loss"] == pytest.approx(loss, rel=rel)
    total = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
    assert found["grads"].keys() == grads.keys()
    for parameter, expected in grads.items():
        distance = float((found["grads"][parameter] - expected).norm())
        assert distance <= rel * max(float(expected.norm()), 1e-3 * total), parameter


def test_a_share_of_nothing_is_the_plain_model():
    plain = replace(BASE, spiking=SpikingConfig())
    row = packed_row()
    with Mesh.build(Layout()) as mesh:
        spiking = exact_chunks(BASE, mesh, seq_len=40)[0]
        set_share(spiking, 0.0)
        (without,) = forward_rows(spiking, mesh, [row])
        (expected,) = forward_rows(exact_chunks(plain, mesh, seq_len=40)[0], mesh, [row])
        assert torch.equal(without, expected)
        set_share(spiking, 1.0)
        (replaced,) = forward_rows(spiking, mesh, [row])
    assert (replaced - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("recompute", Recompute)
def test_recompute_changes_nothing(recompute):
    """Also not what observers see."""
    model, row = MODELS["experts"], packed_row()
    found = exact_step(0, Layout(), model, [row], recompute=recompute)
    whole = exact_step(0, Layout(), model, [row])
    assert found["loss"] == whole["loss"] and found["seen"] == whole["seen"]
    for name, grad in whole["grads"].items():
        assert torch.equal(found["grads"][name], grad), name


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.selective])
def test_rows_that_fill_up_experts_are_not_counted(recompute):
    model, row = MODELS["experts"], packed_row()
    whole = exact_step(0, Layout(), model, [row], recompute=recompute)
    aligned = exact_step(0, Layout(), model, [row], recompute=recompute, experts=ExpertsConfig(align_tokens=64))
    assert aligned["seen"] == whole["seen"] and aligned["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def places_of(model: ModelConfig) -> list[tuple[int, str, float]]:
    with Mesh.build(Layout()) as mesh:
        built = build_model(model, mesh, precision=Precision.fp32, seq_len=40)
        return sorted((neuron.layer, neuron.site, neuron.k) for neuron in neurons(built))


def test_neurons_are_where_the_table_says():
    assert places_of(replace(BASE, spiking=SpikingConfig(skip={"qkv": "all"}))) == []
    released = places_of(MODELS["as_released"])
    assert [place[:2] for place in released] == [
        *((0, site) for site in ("gate_up", "proj", "qkv")),
        *((1, site) for site in ("gate_up", "proj", "qkv", "queries")),
    ]
    some = replace(ALL, skip={"qkv": "0,2", "gate": "1-2", "proj": "all", "down": "0-1"}, layer_k={2: 5.0})
    assert places_of(replace(BASE, spiking=some)) == [
        (0, "gate", 3.0), (0, "gate_up", 3.0), (1, "gate_up", 3.0), (1, "qkv", 3.0), (1, "queries", 3.0),
        (2, "down", 5.0), (2, "gate_up", 5.0),
    ]  # fmt: skip


def test_spikes_add_nothing_to_checkpoints():
    with Mesh.build(Layout()) as mesh:
        states = []
        for model in (BASE, replace(BASE, spiking=SpikingConfig())):
            built = build_model(model, mesh, precision=Precision.fp32, seq_len=40)
            sharded = built.sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp})
            states.append((list(sharded), list(built.state_dict())))
    assert states[0] == states[1]
