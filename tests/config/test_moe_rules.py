"""What is refused of mixtures of experts: one line with the key and the fix."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.layout import Layout
from sbtrain.bench.shapes import TINY
from sbtrain.config.model_schema import MoEConfig, RouterScore
from sbtrain.config.moe_rules import check_moe, experts_problem
from sbtrain.config.moe_schema import Align, ExpertsConfig
from sbtrain.config.rules import layout_problem, world_problem
from sbtrain.config.schema import Recompute, Stage

MODEL = replace(TINY, pattern="L:m")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 17}, "model.moe.top_k=17 exceeds model.moe.num_experts=16; lower it"),
        ({"top_k": 0}, "model.moe.top_k=0 is too small; give 1 or more"),
        ({"renormalize": True}, "model.moe.renormalize=true makes every weight 1 with model.moe.top_k=1"),
        ({"bias_update_rate": 0.1}, "model.moe.bias_update_rate=0.1 needs model.moe.score=sigmoid; set the rate to 0"),
        ({"num_experts": 0}, "model.moe.num_experts=0 is too small; give 1 or more"),
        ({"capacity_factor": -1.0}, "model.moe.capacity_factor=-1.0 is too small; give 0 or more"),
        ({"aux_loss_coeff": float("nan")}, "model.moe.aux_loss_coeff=nan is too small"),
        ({"exact_aux_loss": True, "aux_loss_coeff": 0.0}, "model.moe.exact_aux_loss=true has no effect"),
        ({"expert_ffn_size": 0}, "model.moe.expert_ffn_size=0 must be 1 or more; null is model.ffn_size"),
    ],
)
def test_mixtures_that_cannot_be_trained(changes, words):
    moe = replace(MoEConfig(), **changes)
    with pytest.raises(ValueError) as caught:
        check_moe(replace(MODEL, moe=moe))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError):
        check_moe(replace(TINY, moe=moe))  # plans divide by them whether a layer has a mixture or not


def test_mixtures_that_can_be_trained():
    check_moe(MODEL)
    check_moe(
        replace(MODEL, moe=MoEConfig(top_k=2, renormalize=True, score=RouterScore.sigmoid, bias_update_rate=1e-3))
    )


@pytest.mark.parametrize(
    ("experts", "stage", "words"),
    [
        ({"max_copies": 1}, {}, "experts.max_copies=1 copies nothing with layout.ep=1; set it to 0"),
        (
            {"max_copies": 1, "copy_above": 1.0},
            {"layout": Layout(ep=2)},
            "experts.copy_above=1.0 must exceed experts.release_below=1.5",
        ),
        (
            {"max_copies": 17},
            {"layout": Layout(ep=2)},
            "experts.max_copies=17 exceeds model.moe.num_experts=16; lower it",
        ),
        ({"copy_above": -1.0}, {}, "experts.copy_above=-1.0 must exceed experts.release_below=1.5"),
        ({"release_below": 0.0}, {}, "experts.copy_above=3.0 must exceed experts.release_below=0.0"),
        ({"align": Align.drop}, {}, "experts.align=drop drops nothing with experts.align_tokens=1"),
        ({"align_tokens": 0}, {}, "experts.align_tokens=0 is too small; give 1 or more"),
        (
            {"recompute_above_tokens": 9},
            {"recompute": Recompute.full},
            "experts.recompute_above_tokens=9 has no effect",
        ),
    ],
)
def test_ways_to_run_experts_that_make_no_sense(experts, stage, words):
    problem = experts_problem(MODEL, Stage(experts=ExpertsConfig(**experts), **stage))
    assert problem.startswith(words) and "\n" not in problem


def test_a_model_without_mixtures_has_no_experts_to_run():
    problem = experts_problem(TINY, Stage(experts=ExpertsConfig(align_tokens=8)))
    assert problem.startswith("experts has no effect: model.pattern 'F' has no layer with :m")
    assert experts_problem(TINY, Stage()) is None


def test_ep_divides_the_experts_and_the_ranks():
    problem = layout_problem(MODEL, Stage(), Layout(ep=3))
    assert problem == "layout.ep=3 does not divide model.moe.num_experts=16; choose an ep that does"
    odd = replace(MODEL, moe=replace(MODEL.moe, expert_ffn_size=25))
    problem = layout_problem(odd, Stage(), Layout(tp=2))
    assert problem.startswith("layout.tp=2 does not divide the 25 channels of the shared experts")
    assert layout_problem(replace(odd, moe=replace(odd.moe, num_shared_experts=0)), Stage(), Layout(tp=2)) is None
    stage = Stage(seq_len=8, global_batch_tokens=96, layout=Layout(ep=4, pp=2))
    assert world_problem(stage, 8) is None
    assert "layout ep 4 does not divide the 6 ranks of a pipeline stage" in world_problem(stage, 12)
