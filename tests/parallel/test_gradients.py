"""The head's gradient, which its op adds to the fp32 buffer itself, against the same step through autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from layout_case import ADAM, build_engine, fill, one_step, packed_rows, small_model
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.recompute import recomputed
from parallel.schedule import evaluate_rows
from parallel.sequence.shard import shard_row
from sbtrain.config.schema import Precision, Recompute
from sbtrain.model.build import build_model


def both_ways(rank: int, layout: Layout, model, rows, **options):
    """one_step as it is, and with the buffers hidden from the model."""
    from sbtrain.model import hybrid

    direct = one_step(rank, layout, model, rows, **options)
    offer, hybrid.gradient_buffer = hybrid.gradient_buffer, lambda weight: None
    try:
        return direct, one_step(rank, layout, model, rows, **options)
    finally:
        hybrid.gradient_buffer = offer


CASES = {
    "micro_batches": (1, Layout(), {}, Recompute.none),
    "tied": (1, Layout(), dict(tie_embeddings=True), Recompute.none),
    "recompute": (1, Layout(), dict(tie_embeddings=True), Recompute.full),
    "tied_tp2": (2, Layout(tp=2), dict(tie_embeddings=True), Recompute.none),
    "tp2_seq": (2, Layout(tp=2, tp_sequence_parallel=True), {}, Recompute.selective),
    "pp2": (2, Layout(pp=2), {}, Recompute.none),
    "tied_pp2": (2, Layout(pp=2), dict(tie_embeddings=True), Recompute.none),
    "dp2": (2, Layout(), dict(tie_embeddings=True), Recompute.none),
}


@pytest.mark.parametrize("name", CASES)
def test_direct_gradients_equal_autograds(name, run_ranks):
    num_ranks, layout, changes, recompute = CASES[name]
    case = (layout, small_model(**changes), packed_rows(4, 48, 120))
    for direct, plain in run_ranks(num_ranks)(both_ways, *case, recompute=recompute):
        check_same(direct, plain)


def check_same(direct: dict, plain: dict) -> None:
    """But for the order of sums in fp32."""
    for key in ("loss", "grad_norm", "after"):
        assert direct[key] == pytest.approx(plain[key], rel=1e-6), key
    for key, expected in plain["grads"].items():
        assert (direct["grads"][key] - expected).norm() <= 1e-6 * expected.norm(), key


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [False, True])
def test_direct_gradients_when_the_reduction_overlaps_the_backward_pass(tied, run_ranks):
    """Buckets are reduced as soon as their gradients are ready only from the second step on."""
    case = (Layout(), small_model(tie_embeddings=tied), packed_rows(3, 48, 120))
    gpu = run_ranks(1, backend="nccl", timeout_s=400.0)
    ((direct, plain),) = gpu(both_ways, *case, num_steps=2)
    check_same(direct, plain)


def overlapping(rank: int, layout: Layout, model, rows) -> list:
    """(loss, norm, gradients) of three steps, each followed by an evaluation: without overlap, and as on GPUs."""
    from parallel import engine as module

    plain, found = module.GradientBuffers, []
    for overlap in (False, True):
        module.GradientBuffers = partial(overridden, plain, overlap)
        try:
            with Mesh.build(layout) as mesh:
                engine = build_engine(model, mesh, seq_len=len(rows[0].tokens))
                no_sync = [chunk.no_sync for chunk in engine.chunks]
                engine.config.no_sync_func = (no_sync if layout.vpp > 1 else no_sync[0]) if overlap else None
                found.append([step_and_evaluate(engine, mesh, rows) for _ in range(3)])
                engine.close()
        finally:
            module.GradientBuffers = plain
    return found


def overridden(kind, overlap_wanted: bool, config, module, *, overlap: bool, **options):
    return kind(config, module, overlap=overlap_wanted, **options)


def step_and_evaluate(engine, mesh, rows) -> list[torch.Tensor]:
    loss = engine.forward_backward(rows[mesh.dp_rank :: mesh.dp])
    engine.gather_gradients()
    grads = [parameter.main_grad.clone() for model in engine.models for parameter in model.parameters()]
    norm = engine.step(lr=1e-2)
    evaluate_rows(engine.chunks, mesh, rows[:1])
    return [torch.tensor(loss.mean), torch.tensor(norm), *grads]


@pytest.mark.parametrize(
    "num_ranks, layout", [(2, Layout()), (2, Layout(pp=2)), (4, Layout(pp=2)), (4, Layout(pp=2, vpp=2))], ids=str
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_reduction_may_overlap_the_backward_pass(num_ranks, layout, tied, run_ranks):
    case = (layout, small_model(tie_embeddings=tied), packed_rows(8, 48, 120))
    for plain, overlapped in run_ranks(num_ranks)(overlapping, *case):
        for expected, actual in zip(sum(plain, []), sum(overlapped, [])):
            assert (actual - expected).norm() <= 1e-5 * expected.norm()


def steps_around_a_failure(rank: int, model, rows) -> list[torch.Tensor]:
    """The head's gradient after a step, and after one that follows a step that raised in its second micro-batch."""
    with Mesh.build(Layout()) as mesh:
        engine = build_engine(model, mesh, seq_len=len(rows[0].tokens))
        weight, loss, found = engine.model.head_weight(), engine.model._loss, []
        engine.forward_backward(rows)
        found.append(weight.main_grad.clone())
        with pytest.raises(StopIteration):
            losses = iter([loss])
            engine.model._loss = lambda *x: next(losses)(*x)
            engine.forward_backward(rows)
        engine.model._loss = loss
        evaluate_rows(engine.chunk, mesh, rows)
        engine.forward_backward(rows)
        found.append(weight.main_grad.clone())
        engine.close()
        return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_after_one_that_failed(tied, run_ranks):
    ((before, after),) = run_ranks(1)(steps_around_a_failure, small_model(tie_embeddings=tied), packed_rows(3, 48, 120))
    assert torch.equal(before, after)


def frozen_both_ways(rank: int, trained: str, model, rows) -> list:
    """Gradients with the buffers offered and hidden. trained: "all but head" or "head alone"."""
    from sbtrain.model import hybrid

    found, offer = [], hybrid.gradient_buffer
    for hide in (False, True):
        hybrid.gradient_buffer = (lambda weight: None) if hide else offer
        try:
            with Mesh.build(Layout()) as mesh:
                stage = build_model(model, mesh, precision=Precision.fp32, seq_len=len(rows[0].tokens))
                fill(stage, model, mesh)
                for parameter in stage.parameters():
                    parameter.requires_grad_((parameter is stage.head_weight()) == (trained == "head alone"))
                engine = Engine(stage, mesh, adam=ADAM)
                engine.forward_backward(rows)
                found.append([p.main_grad.clone() for p in stage.parameters() if p.requires_grad])
                engine.close()
        finally:
            hybrid.gradient_buffer = offer
    return found


@pytest.mark.parametrize("trained", ["head alone", "all but head"])
def test_frozen_parameters(trained, run_ranks):
    ((direct, plain),) = run_ranks(1)(frozen_both_ways, trained, small_model(), packed_rows(2, 48, 120))
    for actual, expected in zip(direct, plain, strict=True):
        assert (actual - expected).norm() <= 1e-6 * expected.norm()


def test_direct_gradients_are_not_rounded_to_bf16(run_ranks):
    ((direct, plain),) = run_ranks(1)(
        both_ways, Layout(), small_model(), packed_rows(1, 48, 120), precision=Precision.bf16
    )
    name = "output_layer.weight"
    assert (plain["grads"][name].bfloat16() == plain["grads"][name]).all()
    assert not (direct["grads"][name].bfloat16() == direct["grads"][name]).all()
    assert (direct["grads"][name] - plain["grads"][name]).norm() <= 1e-2 * plain["grads"][name].norm()


def evaluation_between_steps(rank: int, model, rows):
    """Gradients of the head after a step, an evaluation, the same step again, and a call of one's own."""
    with Mesh.build(Layout()) as mesh:
        engine = build_engine(model, mesh, seq_len=len(rows[0].tokens))
        found = []
        weight = engine.model.head_weight()
        for action in (
            engine.forward_backward,
            lambda x: evaluate_rows(engine.chunk, mesh, x),
            engine.forward_backward,
        ):
            action(rows)
            found.append(weight.main_grad.clone())
        row = rows[0]
        losses = engine.model(row.tokens, shard_row(row, rank=0, size=1)[2], row.labels)
        losses.sum().backward()
        found.append(weight.main_grad.clone())
        engine.close()
        return found


def test_only_training_steps_write_gradients(run_ranks):
    (found,) = run_ranks(1)(evaluation_between_steps, small_model(), packed_rows(2, 48, 120))
    for other in found[1:3]:
        assert torch.equal(other, found[0])
    assert not torch.equal(found[3], found[0])


def recomputed_losses(rank: int, model, rows):
    with Mesh.build(Layout()) as mesh:
        engine = build_engine(model, mesh, seq_len=len(rows[0].tokens))
        loss = engine.model._loss
        engine.model._loss = lambda *x: recomputed(loss, *x)
        try:
            engine.forward_backward(rows)
        finally:
            engine.close()


def test_recomputed_losses_are_refused(run_ranks):
    with pytest.raises(RuntimeError, match="1 forward passes wrote gradients and had no backward pass"):
        run_ranks(1)(recomputed_losses, small_model(), packed_rows(1, 48, 120))
