"""The gradient of the aux loss against its definition: the load of the whole global batch, taken in the step itself."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from layout_case import build_engine, check_equal, one_step, packed_rows, small_model
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import shard_row
from sbtrain.config.model_schema import MoEConfig, RouterScore
from sbtrain.model.build import global_parameters

COEFF = 0.5
TOP1 = MoEConfig(num_experts=8, expert_ffn_size=24, aux_loss_coeff=COEFF)
SIGMOID = replace(TOP1, top_k=2, score=RouterScore.sigmoid)
ROWS = packed_rows(4, 48, 120)


def mixture(moe: MoEConfig):
    return small_model(pattern="L S F:m L:m", moe=moe)


def defined(rank: int, moe: MoEConfig) -> dict:
    """Gradients of COEFF * E * sum_e f_e P_e over all rows at once, by autograd, with the weights at the start."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(Layout()))
        engine = build_engine(mixture(moe), mesh, seq_len=48)
        stack.callback(engine.close)
        given: dict[int, list] = {}
        for index, layer in enumerate(engine.model.decoder.layers):
            if layer.kind.moe:
                layer.mlp.register_forward_pre_hook(
                    lambda module, args, index=index: given.setdefault(index, []).append(args[0][:, 0])
                )
        for row in ROWS:
            engine.model(row.tokens, shard_row(row, rank=0, size=1)[2], row.labels)
        loss = 0.0
        for index, inputs in given.items():
            logits = torch.cat(inputs) @ engine.model.decoder.layers[index].mlp.router.weight.T
            scores = logits.softmax(-1) if moe.score is RouterScore.softmax else logits.sigmoid()
            chosen = torch.nn.functional.one_hot(scores.topk(moe.top_k).indices, moe.num_experts).sum((0, 1))
            shares = scores / scores.sum(-1, keepdim=True)
            loss = loss + COEFF * moe.num_experts * (chosen / chosen.sum() * shares.mean(0)).sum()
        parameters = global_parameters(engine.model)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads)}


@pytest.mark.parametrize("moe", [TOP1, SIGMOID], ids=["top1", "sigmoid2"])
@pytest.mark.parametrize("ranks, layout", [(1, Layout()), (2, Layout(pp=2))], ids=["one", "pp2"])
def test_the_first_step_weighs_with_its_own_load(moe, ranks, layout, run_ranks):
    (expected,) = run_ranks(1)(defined, moe)
    with_loss = run_ranks(ranks)(one_step, layout, mixture(moe), ROWS)
    without = run_ranks(ranks)(one_step, layout, mixture(replace(moe, aux_loss_coeff=0.0)), ROWS)
    total = float(torch.stack([grad.norm() for grad in expected.values()]).norm())
    assert total > 0
    for one, two in zip(with_loss, without):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        for name, grad in one["grads"].items():
            assert float((grad - two["grads"][name] - expected[name]).norm()) <= 1e-4 * total, name


def test_every_step_does_where_the_recipe_wants_it(run_ranks):
    """Three steps with the exact loss: the same on ranks of every kind, and not that of the load of a step before."""
    exact = mixture(replace(TOP1, exact_aux_loss=True))
    (whole,) = run_ranks(1)(one_step, Layout(), exact, ROWS, num_steps=3)
    check_equal(run_ranks(4)(one_step, Layout(ep=2, pp=2), exact, ROWS, num_steps=3), whole)
    (late,) = run_ranks(1)(one_step, Layout(), mixture(TOP1), ROWS, num_steps=3)
    name = "decoder.layers.3.mlp.router.weight"
    assert torch.equal(late["grads"][name], whole["grads"][name]), "the first step knows its own"
    assert not torch.allclose(late["last_grads"][name], whole["last_grads"][name], rtol=1e-4)
