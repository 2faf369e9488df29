"""A training step with numbers that are not finite leaves the engine bit by bit as it was, on every rank and layout."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext

import pytest
import torch

from expert_checkpoint_case import state_of
from layout_case import build_engine, overlapped, packed_rows, small_model
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.config.model_schema import MoEConfig, RouterScore
from sbtrain.config.moe_schema import PLAIN, ExpertsConfig

PLAIN_MODEL = small_model()
MOE = MoEConfig(
    num_experts=8, top_k=2, expert_ffn_size=24, score=RouterScore.sigmoid, bias_update_rate=0.01, aux_loss_coeff=0.05
)
EXPERTS = small_model(pattern="L S F:m L:m", moe=MOE)
HOT = ExpertsConfig(max_copies=2, copy_above=1.2, release_below=0.8)
STEPS = [packed_rows(4, 48, 120, seed=seed) for seed in (1, 2, 3)]


def train(
    rank: int, layout: Layout, model, experts, is_overlapped: bool, bad: dict[int, str], steps: list[int]
) -> dict:
    """Train on these of STEPS. bad: by step, what one rank alone meets: "hidden" states, or the "loss"."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        stack.enter_context(overlapped() if is_overlapped else nullcontext())
        engine = build_engine(model, mesh, seq_len=48, experts=experts)
        stack.callback(engine.close)
        figures, skipped, rows = [], [], []
        for step in steps:
            odd = mesh.dp_rank == mesh.dp - 1 and mesh.tp_rank == mesh.sp_rank == 0 and mesh.is_last_stage
            hook = _break_hidden(engine) if odd and bad.get(step) == "hidden" else None
            loss = engine.forward_backward(STEPS[step][mesh.dp_rank :: mesh.dp]).mean
            if hook is not None:
                hook.remove()
            engine._sound = engine._sound and not (odd and bad.get(step) == "loss")
            norm = engine.step(lr=1e-2)
            skipped.append(engine.skipped)
            rows.append(engine.broken_rows() if engine.skipped else [])
            if not engine.skipped:
                figures.append((loss, norm))
        return dict(figures=figures, skipped=skipped, rows=rows, state=state_of(engine), odd=odd)


def _break_hidden(engine):
    """NaN in one channel of the last layer's output, in every row of the step."""
    return engine.model.decoder.final_layernorm.register_forward_pre_hook(_with_nan)


def _with_nan(module, inputs):
    channel = torch.zeros(inputs[0].shape[-1], device=inputs[0].device)
    channel[3] = math.nan
    return (inputs[0] + channel, *inputs[1:])


CASES = {
    "dp2": (2, Layout(), PLAIN_MODEL, PLAIN, False),
    "dp2_overlapped": (2, Layout(), PLAIN_MODEL, PLAIN, True),
    "tp2": (2, Layout(tp=2), PLAIN_MODEL, PLAIN, True),
    "tp2_sequence_parallel": (2, Layout(tp=2, tp_sequence_parallel=True), PLAIN_MODEL, PLAIN, False),
    "pp2": (2, Layout(pp=2), PLAIN_MODEL, PLAIN, True),
    "sp2": (2, Layout(sp=2), PLAIN_MODEL, PLAIN, False),
    "ep2_hot": (2, Layout(ep=2), EXPERTS, HOT, True),
    "ep2_pp2": (4, Layout(ep=2, pp=2), EXPERTS, PLAIN, False),
    "tp2_sp2": (4, Layout(tp=2, sp=2), PLAIN_MODEL, PLAIN, True),
}


@pytest.mark.parametrize("kind", ["hidden", "loss"])
@pytest.mark.parametrize("name", CASES)
def test_a_skipped_step_changes_nothing(name, kind, run_ranks):
    num_ranks, *case = CASES[name]
    if kind == "loss" and num_ranks > 2:
        pytest.skip("two ranks say as much")
    skipping = run_ranks(num_ranks)(train, *case, {1: kind}, [0, 1, 2])
    without = run_ranks(num_ranks)(train, *case, {}, [0, 2])
    for one, other in zip(skipping, without):
        assert one["skipped"] == [False, True, False] and not any(other["skipped"])
        assert one["figures"] == other["figures"]
        assert one["state"]["steps"] == other["state"]["steps"] == {2}
        for part in ("weights", "optimizer", "buffers"):
            assert one["state"][part].keys() == other["state"][part].keys()
            for key, tensor in other["state"][part].items():
                assert torch.equal(one["state"][part][key], tensor), key
    dp = num_ranks // case[0].model_ranks
    broken = [row for row in range(4) if row % dp == dp - 1] if kind == "hidden" else []
    assert skipping[-1]["rows"] == [[], broken, []] or case[0].tp > 1
