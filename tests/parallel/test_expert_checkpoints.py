"""Experts in checkpoints: weights and optimizer state go from one number of expert-parallel ranks to any other."""

from __future__ import annotations

import pytest
import torch

from expert_checkpoint_case import go_on
from layout_case import packed_rows, small_model
from parallel.layout import Layout
from sbtrain.config.model_schema import MoEConfig, RouterScore
from sbtrain.config.moe_schema import ExpertsConfig
from sharding import local_shard

MOE = MoEConfig(
    num_experts=8, top_k=2, expert_ffn_size=24, score=RouterScore.sigmoid, bias_update_rate=0.01, aux_loss_coeff=0.05
)
MODEL = small_model(pattern="L S F:m L:m", moe=MOE)
ROWS = packed_rows(4, 48, 120)
TARGETS = {
    "ep1": (1, Layout()),
    "ep1_dp2": (2, Layout()),
    "ep2": (2, Layout(ep=2)),
    "ep4": (4, Layout(ep=4)),
    "ep2_tp2": (4, Layout(ep=2, tp=2)),
    "ep2_pp2": (4, Layout(ep=2, pp=2)),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, run_ranks):
    """Two steps on one rank, and the third."""
    (two,) = run_ranks(1)(go_on, Layout(), MODEL, ROWS, str(tmp_path_factory.mktemp("none")), 2)
    (three,) = run_ranks(1)(go_on, Layout(), MODEL, ROWS, str(tmp_path_factory.mktemp("none")), 3)
    return two["last"], three


def check_shards(result: dict, found: dict, whole: dict, *, rel: float) -> None:
    """Each of a rank's tensors, found, against its shard of the whole ones."""
    place = result["place"]
    for name, tensor in found.items():
        expected = local_shard(name, whole[name], **place)
        assert tensor.shape == expected.shape, name
        assert float((tensor - expected).norm()) <= rel * max(float(expected.norm()), 1e-6), name


@pytest.mark.parametrize("source", ["ep2", "ep1_dp2", "ep2_pp2"])
def test_any_expert_parallel_layout_reads_what_another_wrote(source, tmp_path, uninterrupted, run_ranks):
    num_ranks, layout = TARGETS[source]
    run_ranks(num_ranks)(go_on, layout, MODEL, ROWS, str(tmp_path), 2, save=True)
    two, three = uninterrupted
    for number, target in TARGETS.values() if source == "ep2" else [TARGETS["ep1"], TARGETS["ep4"]]:
        for result in run_ranks(number)(go_on, target, MODEL, ROWS, str(tmp_path), 1):
            assert result["loaded"]["steps"] == {2}
            for part in ("weights", "optimizer"):
                check_shards(result, result["loaded"][part], two[part], rel=1e-4)
            for name, buffer in result["loaded"]["buffers"].items():
                assert any(torch.equal(buffer, other) for other in two["buffers"].values()), name
            assert result["losses"][0] == pytest.approx(three["losses"][2], rel=1e-5)
            check_shards(result, result["last"]["weights"], three["last"]["weights"], rel=1e-4)


def test_resume_on_the_same_layout_is_bitwise_with_copies_of_hot_experts(tmp_path, run_ranks):
    options = ExpertsConfig(max_copies=2, copy_above=1.2, release_below=0.8)
    whole = run_ranks(2)(go_on, Layout(ep=2), MODEL, ROWS, str(tmp_path / "a"), 4, experts=options)
    run_ranks(2)(go_on, Layout(ep=2), MODEL, ROWS, str(tmp_path / "b"), 2, save=True, experts=options)
    again = run_ranks(2)(go_on, Layout(ep=2), MODEL, ROWS, str(tmp_path / "b"), 2, experts=options)
    for one, two in zip(whole, again):
        assert one["losses"][2:] == two["losses"]
        for name, weight in one["last"]["weights"].items():
            assert torch.equal(weight, two["last"]["weights"][name]), name
