"""Spiking models on n ranks are those of 1 rank, in float64: thresholds are of whole tokens wherever channels are cut.

In fp32 the sum of |x| over tp ranks may round otherwise than one rank's, and a count next to a half then be another.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ops
from exact_case import check_exact, exact_step
from layout_case import one_step, packed_rows, small_model
from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from parallel.mesh import Mesh
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MergePlace, MetaConfig, MoEConfig, PairConfig
from sbtrain.config.schema import Recompute
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.spiking.neuron import Neuron

SPIKING = SpikingConfig(enabled=True, spike_down_proj=True, layer_k={1: 2.0}, skip={"qkv": "3", "proj": "1"})
HEADS = SequenceAlgorithms(*[SequenceAlgorithm.ulysses] * 3)
STATES = SequenceAlgorithms(S=SequenceAlgorithm.halo, L=SequenceAlgorithm.lasp2)
TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
PAIRS = dict(pattern="(LS)(LF)", gla=TIED)
BEFORE = PairConfig(norm_place=MergePlace.before_projection)
EXPERTS = MoEConfig(num_experts=4, top_k=2, expert_ffn_size=24, num_shared_experts=2)
MODELS = {
    "plain": {},
    "pairs": dict(**PAIRS, meta=MetaConfig(num_tokens=6)),
    "shared": dict(**PAIRS, pair=PairConfig(shared_projections=True)),
    "before": dict(**PAIRS, pair=BEFORE),
    "experts": dict(pattern="L S F:m L:m", moe=EXPERTS),
}
LAYOUTS = {
    "tp2": (2, Layout(tp=2)),
    "tp2_seq": (2, Layout(tp=2, tp_sequence_parallel=True)),
    "pp2": (2, Layout(pp=2)),
    "sp2": (2, Layout(sp=2, sp_algorithm=HEADS)),
    "sp2_states": (2, Layout(sp=2, sp_algorithm=STATES)),
    "ep2": (2, Layout(ep=2)),
    "ep2_tp2": (2, Layout(ep=2, tp=2)),
    "tp2_seq_sp2_states": (4, Layout(tp=2, sp=2, tp_sequence_parallel=True, sp_algorithm=STATES)),
    "tp2_seq_pp2": (4, Layout(tp=2, pp=2, tp_sequence_parallel=True)),
}
CASES = [
    *[("plain", name) for name in ("tp2", "tp2_seq", "pp2", "sp2", "sp2_states", "tp2_seq_sp2_states")],
    *[("pairs", name) for name in ("tp2_seq", "sp2_states", "tp2_seq_pp2")],
    ("shared", "tp2_seq"),
    *[("before", name) for name in ("tp2", "sp2")],
    *[("experts", name) for name in ("tp2", "ep2", "ep2_tp2")],
]


def model_of(name: str, **changes):
    model = small_model(**MODELS[name], spiking=replace(SPIKING, **changes))
    return replace(model, moe=replace(model.moe, aux_loss_coeff=0.0))


@pytest.mark.parametrize(("name", "on"), CASES)
def test_layout_equals_one_rank(name, on, run_ranks):
    num_ranks, layout = LAYOUTS[on]
    model, rows = model_of(name), packed_rows(4, 48, 120)
    (whole,) = run_ranks(1)(exact_step, Layout(), model, rows)
    results = run_ranks(num_ranks)(exact_step, layout, model, rows)
    # what a router weighs with is fp32, and the state that a document starts from where there are shards
    # the weights of experts are fp32, and each tp rank deals with a part of the tokens
    check_exact(results, whole, rel=1e-5 if name == "experts" else 1e-9)


@pytest.mark.parametrize("recompute", [Recompute.activations, Recompute.selective, Recompute.full])
def test_recompute_changes_nothing(recompute, run_ranks):
    """Part of the way in, where thresholds cross tp ranks."""
    model, rows = model_of("experts"), packed_rows(2, 48, 120)
    layout = Layout(tp=2, tp_sequence_parallel=True)
    whole = run_ranks(2)(exact_step, layout, model, rows, share=0.4)
    for found, expected in zip(run_ranks(2)(exact_step, layout, model, rows, share=0.4, recompute=recompute), whole):
        assert found["loss"] == expected["loss"]
        for name, grad in expected["grads"].items():
            assert torch.equal(found["grads"][name], grad), name


def test_without_the_mean_over_tp_ranks_they_would_differ(run_ranks, monkeypatch):
    """The test above can tell: the same model whose row-parallel inputs are counted by themselves."""
    model, rows = model_of("plain"), packed_rows(2, 48, 120)
    (whole,) = run_ranks(1)(exact_step, Layout(), model, rows)
    results = run_ranks(2)(_step_of_shards, Layout(tp=2), model, rows)
    assert abs(results[0]["loss"] - whole["loss"]) > 1e-5 * whole["loss"]


def _step_of_shards(rank: int, *args):
    plain, Neuron.mean_abs = Neuron.mean_abs, lambda self, x: None
    try:
        return exact_step(rank, *args)
    finally:
        Neuron.mean_abs = plain


def counts_of(rank: int, x: torch.Tensor) -> torch.Tensor:
    """Counts of this tp rank's half of the channels."""
    with Mesh.build(Layout(tp=2)) as mesh:
        neuron = Neuron(k=3.0, site="proj", layer=0, tp_group=mesh.groups.tp)
        part = x.chunk(2, dim=-1)[rank]
        return ops.spike_count(part, mean_abs=neuron.mean_abs(part))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_how_many_counts_another_order_of_the_sum_changes(dtype, run_ranks):
    """None in float64; in fp32 a few in a million, by one each; in bf16 the mean is rounded, which hides the order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 512, generator=generator) * 3 * torch.rand(1000, 1, generator=generator)
    x = x.to(dtype)
    whole, _ = ops.spike_count(x)
    apart = (torch.cat(run_ranks(2)(counts_of, x), dim=-1) - whole).abs()
    assert apart.count_nonzero() <= (0 if dtype is torch.float64 else 1e-5 * apart.numel())
    assert apart.max() <= 1


@pytest.mark.parametrize("on", ["tp2", "pp2", "sp2_states"])
def test_engines_say_the_same_of_sparsity(on, run_ranks):
    """All tokens are sampled here. fp32: counts next to a half may differ, which the mean hardly sees."""
    num_ranks, layout = LAYOUTS[on]
    model, rows = model_of("plain"), packed_rows(1, 48, 120)
    (whole,) = run_ranks(1)(one_step, Layout(), model, rows)
    expected = whole["metrics"][0]["spike_sparsity"]
    assert 0.3 < expected < 0.95
    for result in run_ranks(num_ranks)(one_step, layout, model, rows):
        assert result["metrics"][0]["spike_sparsity"] == pytest.approx(expected, abs=1e-3)
        assert "spike_share" not in result["metrics"][0]
