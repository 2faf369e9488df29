"""Watch: signals are noted and given back, one told rank stops all, intervals save, broken numbers stop the run."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from parallel.mesh import start_distributed
from sbtrain.checkpoint.state import RunState
from sbtrain.config.schema import WatchConfig
from sbtrain.train.watch import Watch

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def watch(save_every_steps: int = 0) -> Watch:
    return Watch(save_every_steps=save_every_steps, device=torch.device("cpu"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_the_run_after_the_step(number):
    start_distributed()
    before = [signal.getsignal(one) for one in SIGNALS]
    with watch() as one:
        assert not one.must_stop()
        os.kill(os.getpid(), number)
        assert one.must_stop() and one.must_stop()
        assert one.reason == number.name
    assert [signal.getsignal(one) for one in SIGNALS] == before


def _told(rank: int, bad: int | None) -> tuple[bool, str]:
    with watch() as one:
        if rank == bad:
            os.kill(os.getpid(), signal.SIGTERM)
        return one.must_stop(), one.reason


def test_one_rank_that_is_told_stops_all(run_ranks):
    assert run_ranks(2)(_told, 1) == [(True, "stopped by another rank"), (True, "SIGTERM")]
    assert [stop for stop, _ in run_ranks(2)(_told, None)] == [False, False]


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_saves_are_due_every_so_many_steps(every, due):
    assert [step for step in range(1, 7) if watch(every).save_due(RunState(stage="a", step=step))] == due


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_where_no_step_may_be_skipped_such_numbers_stop_the_run(tmp_path, loss, grad_norm):
    start_distributed()
    rules = WatchConfig(max_skipped_steps=0)
    strict = Watch(save_every_steps=0, device=torch.device("cpu"), rules=rules, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"step 7 of stage ctx_8k.*schedule\.lr"):
        strict.check(RunState(stage="ctx_8k", step=7), loss=loss, grad_norm=grad_norm)
    watch().check(RunState(stage="ctx_8k", step=7), loss=9e9, grad_norm=0.0)
