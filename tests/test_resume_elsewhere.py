"""A run that goes on with another layout: the same samples, weights and moments, so nearly the same losses.

Equality is that of the design: the first step behind the move within 1e-5, and over 20 steps the moved run no farther
from the run that was not moved than twice the distance between runs that stay on either layout. The optimizer state
is always sharded over the data-parallel ranks (ZeRO-1), so that most rows here shard it anew.
"""

from __future__ import annotations

import pytest

from run_case import curve, run_until, tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit

MOVED_AT, STEPS = 4, 24
MODEL = (
    'model.pattern="(LS):m F L:m S"',
    "model.num_layers=4",
    "model.meta.num_tokens=4",
    "model.moe={num_experts: 4, top_k: 2, expert_ffn_size: 16, score: sigmoid, bias_update_rate: 0.01, "
    "aux_loss_coeff: 0.05}",
    "stages.ctx_32.micro_batch=1",
    f"stages.ctx_32.tokens={STEPS * 128}",
    "~stages.ctx_64",
    "~stages.ctx_128",
    "evaluation.tokens=0",
    "checkpoint.every_steps=0",
)
LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2": (2, dict(tp=2)),
    "tp2_seq": (2, dict(tp=2, tp_sequence_parallel="true")),
    "pp2": (2, dict(pp=2)),
    "pp2_vpp2": (2, dict(pp=2, vpp=2)),
    "pp4": (4, dict(pp=4)),
    "sp2": (2, dict(sp=2)),
    "sp4": (4, dict(sp=4)),
    "ep2": (2, dict(ep=2)),
    "ep4": (4, dict(ep=4)),
    "dp2_tp2": (4, dict(tp=2)),
    "tp2_pp2": (4, dict(tp=2, pp=2)),
    "tp2_sp2": (4, dict(tp=2, sp=2)),
    "pp2_sp2": (4, dict(pp=2, sp=2)),
    "ep2_tp2": (4, dict(ep=2, tp=2)),
    "ep2_pp2": (4, dict(ep=2, pp=2)),
}
PAIRS = [
    *("dp2 tp2_seq", "tp2 pp2", "pp2 sp2", "sp2 ep2", "ep2 one", "one pp2_vpp2"),
    *("one dp4", "dp4 one", "dp4 tp2_pp2", "tp2_pp2 dp4", "dp4 ep4", "ep4 dp2", "sp4 tp2", "tp2 sp4", "pp4 pp2"),
    *("pp2 pp4", "tp2_sp2 dp2", "dp2 pp2_sp2", "ep2_tp2 ep2_pp2", "ep2_pp2 ep4", "pp2_vpp2 pp4", "dp2_tp2 sp2"),
    *("pp2_sp2 ep2_tp2", "tp2_sp2 pp2_vpp2"),
]
"""Layout before and after. The first ones, on two ranks at most, are enough for every kind of parallelism."""
IN_CI = 6


class Runs:
    """Runs of the same recipe on one layout and another, each that stays done once."""

    def __init__(self, root, run_ranks):
        self.root, self.run_ranks, self._curves = root, run_ranks, {}
        write_inputs(root)

    def go(self, name: str, layout: str, stop: int | None = None) -> list[tuple]:
        """Start the run of that name, or go on with it, up to a step or to its end; what it has recorded then."""
        num_ranks, counts = LAYOUTS[layout]
        keys = [f"stages.ctx_32.layout.{key}={value}" for key, value in counts.items()]
        codes = self.run_ranks(num_ranks)(run_until, tiny_recipe(self.root, name, *MODEL, *keys), stop)
        assert set(codes) == {Exit.DONE if stop is None else Exit.REQUEUE}
        return curve(self.root / name)

    def staying(self, layout: str) -> list[tuple]:
        """What a run records that stays on a layout."""
        if layout not in self._curves:
            self._curves[layout] = self.go(layout, layout)
        return self._curves[layout]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_ranks):
    return Runs(tmp_path_factory.mktemp("elsewhere"), run_ranks)


def losses(records: list[tuple]) -> list[float]:
    return [record[3] for record in records[MOVED_AT:]]


def distance(ones: list[tuple], others: list[tuple]) -> float:
    return max(abs(one - other) for one, other in zip(losses(ones), losses(others), strict=True))


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=pytest.mark.slow if place >= IN_CI else []) for place, pair in enumerate(PAIRS)]
)
def test_a_run_moves_to_another_layout(runs, pair):
    before, after = pair.split()
    stayed, other = runs.staying(before), runs.staying(after)
    assert len(stayed) == len(other) == STEPS and losses(stayed)[-1] < losses(stayed)[0] - 0.1
    name = f"{before}_to_{after}"
    assert runs.go(name, before, MOVED_AT) == stayed[:MOVED_AT]
    moved = runs.go(name, after)
    assert moved[:MOVED_AT] == stayed[:MOVED_AT]
    assert [record[:3] for record in moved] == [record[:3] for record in stayed]
    assert losses(moved)[0] == pytest.approx(losses(stayed)[0], rel=1e-5)
    assert moved[MOVED_AT][4] == pytest.approx(stayed[MOVED_AT][4], rel=1e-4), "gradient norm"
    assert distance(moved, stayed) <= 2 * max(distance(stayed, other), 1e-5)
