"""Fault drills: a job is hurt at a seeded moment, the same command goes on, and it ends as if nothing had been."""

from __future__ import annotations

import os

import pytest

from drills.drill import KINDS, draw
from drills.template import Template
from drills.yard import Yard

SEED, COUNT = int(os.environ.get("DRILLS_SEED", 1000)), int(os.environ.get("DRILLS_COUNT", 56))
FEW = [
    (1, "kill_one", "dp2 pp2", False),
    (2, "kill_one", "sp2 tp2", True),
    (3, "kill_all", "dp2 pp2", True),
    (4, "truncate", "sp2 tp2", False),
    (5, "lose_ledger", "dp2 pp2", True),
    (6, "fill", "dp2 pp2", False),
    (22, "fill", "dp2 pp2", True),
    (9, "corrupt", "sp2 tp2", False),
    (8, "sigterm", "dp2 pp2", True),
]
"""Seed, kind, layout, and whether checkpoints are written in the background."""


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    with Template() as template:
        yield Yard(tmp_path_factory.mktemp("drills"), template)


@pytest.mark.parametrize(("seed", "kind", "layout", "asynchronous"), FEW)
def test_a_run_survives(yard, seed, kind, layout, asynchronous):
    print(yard.survive(draw(seed, kind, layout=layout, asynchronous=asynchronous)))


def test_every_kind_is_drilled():
    assert {kind for _, kind, _, _ in FEW} == set(KINDS)
    assert {draw(seed).kind for seed in range(SEED, SEED + COUNT)} == set(KINDS) or COUNT < 50


@pytest.mark.slow
def test_runs_survive(yard):
    """DRILLS_COUNT drills from number DRILLS_SEED on, of all kinds, layouts and moments."""
    drills, survived, died = [draw(seed) for seed in range(SEED, SEED + COUNT)], 0, []
    for drill in drills:
        try:
            print(yard.survive(drill), flush=True)
            survived += 1
        except Exception as error:
            died.append(drill.seed)
            print(f"{drill}: NOT SURVIVED: {drill.fault}: {error!r}", flush=True)
        except pytest.skip.Exception as reason:
            print(f"{drill}: not held, {reason}", flush=True)
    print(f"{survived} of {COUNT} drills survived (seeds {SEED} to {SEED + COUNT - 1})")
    assert not died
