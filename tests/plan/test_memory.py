"""Memory estimates against counts made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.layout import Layout
from sbtrain.config.load import load
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MetaConfig, MoEConfig, PairConfig
from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.config.schema import ModelConfig, Precision, Recompute
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.model.flops import active_parameters, flops_per_token, parameters, visible_keys
from sbtrain.plan.memory import rank_memory, rank_parameters

D, F, V, QUERY, KV = 24, 40, 100, 48, 16
MODEL = ModelConfig(
    vocab_size=V, hidden_size=D, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=8, ffn_size=F, norm_eps=1e-6,
    rope_theta=1e4, max_positions=64, tie_embeddings=False, qkv_bias=True, qk_norm=False, vocab_multiple=4, window=5,
    pattern="LS",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load(["recipe=7b_cpt", "dry_run=true"])


@pytest.fixture(scope="module")
def tiny(recipe):
    stage = replace(
        recipe.stages["ctx_8k"], seq_len=32, micro_batch=1, global_batch_tokens=512, recompute=Recompute.none
    )
    return replace(recipe, model=MODEL), stage


def memory(tiny, layout=None, world_size=1, precision=Precision.bf16, **changes):
    recipe, stage = tiny
    stage = replace(stage, layout=layout or Layout(), **changes)
    return rank_memory(replace(recipe, precision=precision), stage, world_size=world_size)


def test_one_rank_holds_every_parameter(tiny):
    count = sum(parameters(MODEL).values())
    parts = memory(tiny)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (2 * count, 4 * count, 12 * count)
    parts = memory(tiny, precision=Precision.fp32)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * count, 4 * count, 8 * count)


def test_optimizer_is_sharded_over_dp_and_sp(tiny):
    whole = memory(tiny)["optimizer"]
    assert memory(tiny, world_size=4)["optimizer"] == whole / 4
    assert memory(tiny, Layout(sp=2), world_size=8)["optimizer"] == whole / 8


@pytest.mark.parametrize("tie", [False, True])
def test_pipeline_stages_hold_every_parameter_once_and_tied_ones_twice(tie):
    model = replace(MODEL, tie_embeddings=tie)
    ranks = [rank_parameters(model, Layout(pp=2), layers) for layers in (range(0, 2), range(2, 4))]
    assert sum(ranks) == sum(parameters(model).values()) + (V * D if tie else 0)


def test_tensor_parallel_keeps_norms_and_bottleneck_whole():
    whole = 4 * 2 * D + D + 2 * (8 + 16 * D)
    split = sum(parameters(MODEL).values()) - whole
    assert rank_parameters(MODEL, Layout(tp=2), range(4)) == whole + split / 2


def test_activations_by_recompute_mode(tiny):
    mixer = 3 * QUERY + 3 * KV
    per_token = {
        Recompute.none: 2 * (4 * D + mixer + 3 * F),
        Recompute.selective: 2 * (3 * D + mixer),
        Recompute.full: 2 * D,
    }
    for mode, size in per_token.items():
        gates = 0 if mode is Recompute.full else 2 * 8 * KV
        assert memory(tiny, recompute=mode)["activations"] == 32 * (4 * size + gates)
    assert memory(tiny)["recomputed"] == 0
    full = memory(tiny, recompute=Recompute.full)["recomputed"]
    assert full == 32 * (per_token[Recompute.none] + 8 * KV - 2 * D)


def test_what_is_kept_beside_its_spikes(tiny):
    """Of layers LSLS: attention's output in two, and the norm's where the gate does not read what q, k, v read."""

    def more(model, layout=None, **spikes):
        plain, spiking = ((replace(tiny[0], model=replace(model, spiking=each)), tiny[1]) for each in
                          (SpikingConfig(), SpikingConfig(enabled=True, **spikes)))  # fmt: skip
        worlds = dict(layout=layout, world_size=layout.tp if layout else 1)
        return (memory(spiking, **worlds)["activations"] - memory(plain, **worlds)["activations"]) / (2 * 32)

    assert more(MODEL) == more(MODEL, spike_down_proj=True) == 2 * QUERY
    assert more(MODEL, Layout(tp=2)) == QUERY
    assert more(MODEL, skip={"proj": "1"}) == QUERY and more(MODEL, skip={"proj": "all", "gate_up": "all"}) == 0
    assert more(MODEL, skip={"qkv": "0"}) == more(MODEL, skip={"gate": "2"}) == 2 * QUERY + D
    assert more(MODEL, skip={"gate": "all", "qkv": "all"}) == 2 * QUERY
    tied = replace(MODEL, gla=GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied))
    assert more(tied, skip={"qkv": "0"}) == 2 * QUERY
    pairs = replace(tied, pattern="(LS)(LF):m", moe=MoEConfig(num_experts=4, top_k=2))
    assert more(pairs) == 4 * QUERY + 2 * D
    assert more(replace(pairs, pair=PairConfig(shared_projections=True))) == 2 * D


def test_activations_by_layout(tiny):
    whole = memory(tiny)["activations"]
    assert memory(tiny, Layout(sp=2), world_size=2)["activations"] == whole / 2
    assert memory(tiny, micro_batch=2)["activations"] == 2 * whole
    assert memory(tiny, Layout(tp=2, tp_sequence_parallel=True), world_size=2)["activations"] == whole / 2
    assert whole / 2 < memory(tiny, Layout(tp=2), world_size=2)["activations"] < whole


def test_first_pipeline_stage_holds_as_many_rows_as_stages(tiny):
    layer = memory(tiny)["activations"] / 4
    deep = replace(tiny[0], model=replace(MODEL, vocab_size=4))  # the head is nothing: the first stage needs most
    parts = memory((deep, tiny[1]), Layout(pp=4), world_size=4)
    assert parts["activations"] == pytest.approx(4 * layer, rel=0.1)
    one_row = memory((deep, tiny[1]), Layout(pp=4), world_size=4, global_batch_tokens=32)
    assert one_row["activations"] == pytest.approx(layer, rel=0.1)


def test_logits_are_cut_by_tp_and_sp(tiny):
    assert memory(tiny)["logits"] == 6 * 32 * V
    assert memory(tiny, Layout(tp=2, sp=2), world_size=4)["logits"] == 6 * 32 * V / 4


def test_every_stage_of_the_7b_recipe_fits_its_gpus(recipe):
    for stage in recipe.stages.values():
        assert sum(rank_memory(recipe, stage, world_size=256).values()) < 0.9 * 80 * 2**30


MOE = replace(
    MODEL, pattern="(LS)(LF):m", num_layers=4, meta=MetaConfig(num_tokens=3), moe=MoEConfig(num_experts=4, top_k=2),
    gla=GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied),
)  # fmt: skip
EXPERT = 3 * D * F


def test_experts_are_cut_by_ep_and_their_optimizer_state_by_their_own_copies(tiny):
    count = sum(parameters(MOE).values())
    dense = count - 2 * 4 * EXPERT
    tiny = (replace(tiny[0], model=MOE), tiny[1])
    assert memory(tiny)["weights"] == 2 * count and memory(tiny)["optimizer"] == 12 * count
    parts = memory(tiny, Layout(ep=2), world_size=8)
    assert parts["weights"] == 2 * (dense + 2 * 2 * EXPERT)
    assert parts["optimizer"] == 12 * (dense / 8 + 2 * 2 * EXPERT / 4)  # each expert on 4 of the 8 ranks
    parts = memory(tiny, Layout(tp=2, ep=4), world_size=8)
    assert parts["optimizer"] == pytest.approx(
        12 * (rank_parameters(MOE, Layout(tp=2, ep=4), range(4)) - 2 * EXPERT) / 4 + 12 * 2 * EXPERT / 2
    )


def test_active_parameters_and_flops_leave_out_what_a_token_does_not_meet():
    assert sum(parameters(MOE).values()) - active_parameters(MOE) == 2 * 2 * EXPERT
    flops = flops_per_token(MOE, 32)
    assert flops["experts"] == 2 * 2 * 2 * EXPERT and flops["shared_experts"] == 2 * 2 * EXPERT
    assert flops["router"] == 2 * 2 * 4 * D and flops["mlp"] == 2 * 2 * EXPERT
    assert flops["sliding_window"] == 2 * 4 * QUERY * (visible_keys(32, 5) + 3) and flops["gate"] == 0
    twice = flops["projections"]
    assert twice == 2 * flops_per_token(replace(MOE, pair=PairConfig(shared_projections=True)), 32)["projections"]


def test_activations_of_pairs_and_experts(tiny):
    tiny = (replace(tiny[0], model=MOE), tiny[1])
    mixer = 2 * (QUERY + 2 * KV) + 2 * (2 * QUERY + KV) + 2 * D
    ffn, gates, sent = 3 * F, 8 * KV, 2 * D * 2
    dense, moe = (2 * (4 * D + mixer + x) + gates for x in (ffn, 3 * ffn + sent))
    assert memory(tiny)["activations"] == (32 + 3) * (2 * dense + 2 * moe)
    less = memory(tiny, recompute=Recompute.activations)["activations"]
    assert memory(tiny)["activations"] - less == (32 + 3) * 2 * (2 * F + 2 * 3 * F)


def test_copies_of_hot_experts_are_counted_in_every_mixture(tiny):
    tiny = (replace(tiny[0], model=MOE), tiny[1])
    assert "copies" not in memory(tiny, Layout(ep=2), world_size=2)
    parts = memory(tiny, Layout(ep=2), world_size=2, experts=ExpertsConfig(max_copies=3))
    assert parts["copies"] == 2 * 3 * EXPERT * (2 + 4)
