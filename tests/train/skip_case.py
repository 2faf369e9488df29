"""Runs of the tiny recipe in which chosen rows of a chosen step have a loss that is not finite."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

from parallel import schedule
from parallel.engine import Engine
from run_case import run_until
from sbtrain.config.schema import Recipe


def run_breaking(
    rank: int, recipe: Recipe, broken: dict[int, list[int]], stop_at_step: int | None = None, *, kind: str = "nan"
) -> int:
    """Run the recipe; the losses of these rows of the global batch are not finite. Returns the exit code.

    broken: rows by step, from 1 over the run. Only one rank knows at first. kind: "nan", which breaks the gradients
    too, or "inf", added to the loss, which does not.
    """
    forward_backward, forward_step = Engine.forward_backward, schedule._forward_step
    at: dict = {"step": 0, "row": 0}

    def count_and_run(self, rows):
        at.update(step=self.tokens_seen // 128 + 1, row=0)
        return forward_backward(self, rows)

    trained = Engine.trained

    def note_tokens(self, tokens):
        self.tokens_seen = tokens
        trained(self, tokens)

    def step_breaking(rows, model, *, mesh, loss_scale):
        row = at["row"] * mesh.dp + mesh.dp_rank
        at["row"] += 1
        first = mesh.is_last_stage and mesh.tp_rank == mesh.sp_rank == 0
        if not (loss_scale and first and row in broken.get(at["step"], [])):
            return forward_step(rows, model, mesh=mesh, loss_scale=loss_scale)
        scales = next(weight for name, weight in model.named_parameters() if name.endswith("final_layernorm.weight"))
        sound = scales.data.clone()
        scales.data.mul_(math.nan if kind == "nan" else 1.0)
        losses, reduce = forward_step(rows, model, mesh=mesh, loss_scale=loss_scale)
        scales.data.copy_(sound)
        return losses, reduce if kind == "nan" else partial(_infinite, reduce)

    Engine.forward_backward, Engine.trained, schedule._forward_step = count_and_run, note_tokens, step_breaking
    try:
        return run_until(rank, recipe, stop_at_step)
    finally:
        Engine.forward_backward, Engine.trained, schedule._forward_step = forward_backward, trained, forward_step


def _infinite(reduce, losses):
    loss, num_tokens, report = reduce(losses)
    return loss, num_tokens, report + math.inf


def skipped_steps(run_dir: Path) -> list[dict]:
    """What the run says of its skipped steps."""
    return [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").read_text().splitlines()]


def records(run_dir: Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
