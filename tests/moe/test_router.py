"""The router's memory: what a step leaves behind for the next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layer_case import HIDDEN, moe_model
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.config.model_schema import MoEConfig, RouterScore
from sbtrain.config.schema import Precision
from sbtrain.model.build import transformer_config
from sbtrain.moe.router import Router, forced_choice

MOE = MoEConfig(num_experts=4, score=RouterScore.sigmoid, bias_update_rate=0.25)


@pytest.fixture
def router():
    with Mesh.build(Layout()) as mesh:
        config = transformer_config(moe_model(MOE), Layout(), Precision.fp32)
        made = Router(config, moe=MOE, groups=mesh.groups)
        with torch.no_grad():
            made.weight.copy_(torch.eye(4, HIDDEN))
        yield made


def tokens(*experts: int) -> torch.Tensor:
    """Tokens whose greatest logit is that of the given experts."""
    return torch.nn.functional.one_hot(torch.tensor(experts), HIDDEN).float()


def test_a_step_moves_the_bias_against_the_load(router):
    router.step_tokens = 6
    _, chosen = router(tokens(0, 0, 0, 1, 1, 2), torch.tensor([True] * 5 + [False]))
    assert chosen.flatten().tolist() == [0, 0, 0, 1, 1, 2]
    totals = router.tally.take()
    assert totals[:4].tolist() == [3, 2, 0, 0] and totals[-1] == 0
    router.end_step(totals)
    assert router.load.tolist() == pytest.approx([0.6, 0.4, 0, 0])
    assert router.expert_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]
    _, chosen = router(tokens(0, 1), torch.tensor([True, True]))
    assert chosen.flatten().tolist() == [2, 2], "the bias decides, 0.73 - 0.25 < 0.5 + 0.25"
    weights, _ = router(tokens(0), torch.tensor([True]))
    assert float(weights.detach()) == pytest.approx(0.5), "and does not weigh"


def test_evaluation_leaves_nothing_behind(router):
    router.step_tokens = 4
    router.eval()
    router(tokens(0, 1), torch.tensor([True, True]))
    assert not router.tally.take().any()


def test_renormalized_weights_add_up_to_one(router):
    router.moe = replace(MOE, top_k=2, renormalize=True)
    weights, _ = router(tokens(0, 1, 3), torch.ones(3, dtype=torch.bool))
    assert weights.sum(-1).tolist() == pytest.approx([1, 1, 1])


def test_forced_choices_have_their_shares():
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0])
    chosen = forced_choice(shares, 1000, 2)
    counts = torch.bincount(chosen[:, 0], minlength=4) / 1000
    assert torch.allclose(counts, shares, atol=0.01)
    assert ((chosen[:, 0] + 1) % 4 == chosen[:, 1]).all()
