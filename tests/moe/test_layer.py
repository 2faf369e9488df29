"""The mixture-of-experts layer against plain torch, and its features against the layer without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layer_case import draw, plain_gradients, run_layer, without_losses
from parallel.layout import Layout
from sbtrain.config.model_schema import MoEConfig, RouterScore
from sbtrain.config.moe_schema import Align, ExpertsConfig
from sbtrain.config.schema import Recompute

TOP1 = MoEConfig(num_experts=8, aux_loss_coeff=0.3, z_loss_coeff=0.1)
SIGMOID = replace(TOP1, top_k=2, num_shared_experts=2, score=RouterScore.sigmoid)
KINDS = {
    "top1": TOP1,
    "sigmoid2": SIGMOID,
    "renormalized": replace(TOP1, top_k=3, renormalize=True, num_shared_experts=0),
    "sigmoid_renormalized": replace(SIGMOID, renormalize=True),
}
LOAD = [0.3, 0.1, 0.05, 0.05, 0.2, 0.1, 0.15, 0.05]


def close(result: dict, expected: dict, *, rel: float = 2e-5) -> None:
    """Relative norms of the differences."""
    pairs = [(result[key].flatten(1), expected[key].flatten(1)) for key in ("y", "x_grad")]
    pairs += [(result["grads"][name], grad) for name, grad in expected["grads"].items()]
    for found, wanted in pairs:
        assert found.shape == wanted.shape
        assert float((found.double() - wanted.double()).norm()) <= rel * max(float(wanted.double().norm()), 1e-3)


def same(result: dict, expected: dict) -> None:
    """Bit by bit."""
    assert torch.equal(result["y"], expected["y"]) and torch.equal(result["x_grad"], expected["x_grad"])
    for name, grad in expected["grads"].items():
        assert torch.equal(result["grads"][name], grad), name


def joined(results: list[dict]) -> dict:
    """What the ranks of expert parallelism found, as one rank would have."""
    grads = {}
    for name in results[0]["grads"]:
        parts = [result["grads"][name] for result in results]
        grads[name] = torch.cat(parts) if name.startswith("experts") else torch.stack(parts).sum(0)
    both = {key: torch.cat([result[key] for result in results]) for key in ("y", "x_grad")}
    return {**both, "grads": grads, "tally": torch.stack([result["tally"] for result in results]).sum(0)}


@pytest.mark.parametrize("num_meta", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_equals_plain_torch(kind, num_meta, run_ranks):
    (x,), (grad,) = draw(21), draw(21, seed=4)
    (result,) = run_ranks(1)(run_layer, Layout(), KINDS[kind], [x], [grad], load=LOAD, num_meta=num_meta)
    close(result, plain_gradients(KINDS[kind], x, grad, load=LOAD, num_meta=num_meta))
    assert float(result["tally"][:8].sum()) == (21 - num_meta) * KINDS[kind].top_k


@pytest.mark.parametrize("lengths", [(9, 12), (1, 0), (0, 1), (0, 0), (2, 1)])
def test_ranks_may_have_any_number_of_tokens(lengths, run_ranks):
    inputs, grads = draw(*lengths), draw(*lengths, seed=4)
    results = run_ranks(2)(run_layer, Layout(ep=2), SIGMOID, inputs, grads, load=LOAD)
    if sum(lengths):
        close(joined(results), plain_gradients(SIGMOID, torch.cat(inputs), torch.cat(grads), load=LOAD))


@pytest.mark.parametrize("target", [0, 7])
def test_all_tokens_to_one_expert(target, run_ranks):
    forced = [float(e == target) for e in range(8)]
    inputs, grads = draw(9, 12), draw(9, 12, seed=4)
    (whole,) = run_ranks(1)(run_layer, Layout(), TOP1, [torch.cat(inputs)], [torch.cat(grads)], forced=forced)
    result = joined(run_ranks(2)(run_layer, Layout(ep=2), TOP1, inputs, grads, forced=forced))
    close(result, whole)
    unused = [e for e in range(8) if e != target]
    assert not result["grads"]["experts.linear_fc1"][unused].any()


@pytest.mark.parametrize("hot", [(1,), (1, 6), (0, 2, 5)])
def test_copies_of_hot_experts_change_no_number(hot, run_ranks):
    inputs, grads = draw(17, 12), draw(17, 12, seed=4)
    plain = joined(run_ranks(2)(run_layer, Layout(ep=2), SIGMOID, inputs, grads, load=LOAD))
    options = ExpertsConfig(max_copies=3)
    copied = joined(run_ranks(2)(run_layer, Layout(ep=2), SIGMOID, inputs, grads, load=LOAD, hot=hot, options=options))
    close(copied, plain, rel=1e-6)


@pytest.mark.parametrize("recompute", [Recompute.activations, Recompute.selective])
@pytest.mark.parametrize("kind", ["top1", "sigmoid2"])
def test_recompute_changes_no_bit(kind, recompute, run_ranks):
    inputs, grads = draw(17, 12), draw(17, 12, seed=4)
    case = (run_layer, Layout(ep=2), KINDS[kind], inputs, grads)
    for plain, again in zip(run_ranks(2)(*case, load=LOAD), run_ranks(2)(*case, load=LOAD, recompute=recompute)):
        same(again, plain)
        assert torch.equal(again["tally"], plain["tally"])


def test_recompute_of_overloaded_ranks_changes_no_bit(run_ranks):
    inputs, grads = draw(17, 12), draw(17, 12, seed=4)
    case, options = (run_layer, Layout(ep=2), TOP1, inputs, grads), ExpertsConfig(recompute_above_tokens=14)
    for plain, again in zip(run_ranks(2)(*case), run_ranks(2)(*case, options=options)):
        same(again, plain)


@pytest.mark.parametrize("layout", [Layout(), Layout(ep=2)], ids=["ep1", "ep2"])
def test_rows_of_padding_change_nothing(layout, run_ranks):
    inputs, grads = draw(17, 12)[: layout.ep], draw(17, 12, seed=4)[: layout.ep]
    case, options = (run_layer, layout, SIGMOID, inputs, grads), ExpertsConfig(align_tokens=4)
    for plain, padded in zip(run_ranks(layout.ep)(*case), run_ranks(layout.ep)(*case, options=options)):
        close(padded, plain, rel=1e-6)


def test_capacity_drops_the_lightest_and_counts_them(run_ranks):
    moe = without_losses(replace(TOP1, capacity_factor=1.0, num_shared_experts=0))
    (x,), (grad,) = draw(24), draw(24, seed=4)
    (free,) = run_ranks(1)(run_layer, Layout(), replace(moe, capacity_factor=0.0), [x], [grad])
    (held,) = run_ranks(1)(run_layer, Layout(), moe, [x], [grad])
    counts = free["tally"][:8]
    assert float(held["tally"][-1]) == float((counts - 3).clamp(min=0).sum()) > 0
    gone = held["y"].flatten(1).abs().sum(1) == 0
    assert int(gone.sum()) == int(held["tally"][-1])
    assert torch.allclose(held["y"][~gone], free["y"][~gone])
    assert not held["x_grad"][gone].any()


def test_meta_rows_are_never_dropped(run_ranks):
    moe = without_losses(replace(TOP1, capacity_factor=0.5, num_shared_experts=0))
    (x,), (grad,) = draw(24), draw(24, seed=4)
    (held,) = run_ranks(1)(run_layer, Layout(), moe, [x], [grad], num_meta=6)
    assert bool((held["y"][:6].flatten(1).abs().sum(1) > 0).all())
    assert float(held["tally"][-1]) > 0


def test_alignment_by_dropping_leaves_multiples_and_counts(run_ranks):
    moe, options = without_losses(replace(TOP1, num_shared_experts=0)), ExpertsConfig(align_tokens=4, align=Align.drop)
    (x,), (grad,) = draw(24), draw(24, seed=4)
    (held,) = run_ranks(1)(run_layer, Layout(), moe, [x], [grad], options=options)
    counts = held["tally"][:8]
    assert float(held["tally"][-1]) == float((counts % 4).sum()) > 0
    assert int((held["y"].flatten(1).abs().sum(1) == 0).sum()) == int(held["tally"][-1])


def test_everything_may_be_dropped(run_ranks):
    options = ExpertsConfig(align_tokens=64, align=Align.drop)
    inputs, grads = draw(9, 12), draw(9, 12, seed=4)
    results = run_ranks(2)(run_layer, Layout(ep=2), without_losses(TOP1), inputs, grads, options=options)
    assert float(sum(result["tally"][-1] for result in results)) == 21


@pytest.mark.parametrize("num_meta", [0, 6])
@pytest.mark.parametrize("length", [1, 9])
def test_tokens_are_dealt_over_tp(length, num_meta, run_ranks):
    """Both tp ranks have all rows, an odd number; the second one's part ends with a row of padding."""
    moe, num_meta = replace(SIGMOID, num_shared_experts=0), min(num_meta, length - 1)
    (x,), (grad,) = draw(length), draw(length, seed=4)
    case = (run_layer, Layout(ep=2, tp=2), moe, [x, x], [grad, grad])
    results = run_ranks(2)(*case, load=LOAD, num_meta=num_meta, step_tokens=length - num_meta)
    expected = plain_gradients(moe, x, grad, load=LOAD, num_meta=num_meta)
    experts = {key: [result["grads"][key] for result in results] for key in results[0]["grads"] if "experts" in key}
    for result in results:
        close(
            {**result, "grads": {**result["grads"], **{key: torch.cat(parts) for key, parts in experts.items()}}},
            expected,
        )
