"""Health: slow ranks by their own time, memory, disk and clocks, each told once."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import start_distributed
from parallel.pace import Pace
from sbtrain.config.schema import WatchConfig
from sbtrain.train.health import LEAST, Health, Measured

CPU = torch.device("cpu")


def health(tmp_path, kinds: list[int], **options) -> Health:
    """Of ranks on hosts a and b in turn, judged here without them. kinds: pipeline stage by rank."""
    start_distributed()
    one = Health(WatchConfig(), tmp_path, **options)
    one.begin(SimpleNamespace(device=CPU, world_size=1, pp_rank=0))
    one._kinds, one._hosts = kinds, ["ab"[rank % 2] for rank in range(len(kinds))]
    one._ratios = [one._ratios[0].__class__(maxlen=5) for _ in kinds]
    return one


def test_a_slow_rank_is_named_once_and_again_when_it_recovers(tmp_path, capsys):
    one = health(tmp_path, [0] * 8)
    for count in range(1, 6):
        found = one.judge([Measured(1.6 if rank == 5 else 1.0 + 0.01 * rank) for rank in range(8)])
        assert (found["slowest_rank"], found["slowest_ratio"]) == (5, pytest.approx(1.6 / 1.03))
        assert found["compute_time_s"] == pytest.approx(1.03)
        assert (count >= LEAST) == ("slow rank: rank 5 (host b) computes 1.55 times" in capsys.readouterr().out) or (
            count > LEAST
        )
    for _ in range(5):
        one.judge([Measured(1.0)] * 8)
    assert "rank 5 (host b) is no longer slow: 1.00 times" in capsys.readouterr().out


def test_one_slow_measurement_is_no_slow_rank(tmp_path, capsys):
    one = health(tmp_path, [0] * 4)
    for step in range(6):
        one.judge([Measured(3.0 if rank == step % 4 else 1.0) for rank in range(4)])
    assert capsys.readouterr().out == ""


def test_pipeline_stages_are_compared_with_their_like(tmp_path, capsys):
    """The stage of the head computes longer on all of its ranks, which is no fault of theirs."""
    one = health(tmp_path, [0, 0, 1, 1])
    for _ in range(4):
        found = one.judge([Measured(1.0), Measured(1.0), Measured(2.0), Measured(3.0)])
    assert found["slowest_rank"] == 3 and found["slowest_ratio"] == pytest.approx(1.5)
    assert capsys.readouterr().out.count("slow rank: rank 3") == 1


def test_memory_disk_and_clocks(tmp_path, capsys):
    kept = []
    one = health(tmp_path, [0] * 4, checkpoint_bytes=10**10, keep_clocks=kept.append)
    fine = [Measured(1.0, 0.5, 0.0, 1e12, 100.0), *[Measured(1.0, 0.6, 0.0, math.nan, 100.01)] * 3]
    found = one.judge(fine)
    assert (found["memory_share"], found["disk_free_bytes"]) == (0.6, 10**12)
    assert found["clock_skew_s"] == pytest.approx(0.01) and kept == [{"a": -0.01, "b": 0.0}]
    assert capsys.readouterr().out == ""
    for _ in range(4):
        ranks = [Measured(1.0, 0.97, 2.0, 1.5e10, 100.0 + 9 * (rank % 2)) for rank in range(4)]
        found = one.judge(ranks)
    text = capsys.readouterr().out
    assert text.count("memory: rank 0 (host a) has used 97.0% of its GPU") == 1 and "2 times" in text
    assert text.count("disk: 15.0 GB are free") == 1 and "a checkpoint needs 10.0 GB" in text
    assert text.count("clocks: host b is 9.0 s ahead of host a") == 1
    assert len(kept) == 2 and kept[1]["b"] - kept[1]["a"] == pytest.approx(9.0)


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def paces(rank: int) -> tuple[float, float, bool]:
    """Rank 1 works longer and is waited for by both kinds of calls: own seconds, whole seconds, torch as before."""
    before = dict(vars(dist.ProcessGroup)), dict(vars(dist.Work))
    x = torch.ones(4)
    start = time.perf_counter()
    with Pace(CPU) as pace:
        for _ in range(2):
            time.sleep(0.6 if rank else 0.1)
            dist.all_reduce(x)
            time.sleep(0.6 if rank else 0.1)
            dist.all_reduce(x, async_op=True).wait()
            dist.all_gather_object([None, None], rank)
    whole_s = time.perf_counter() - start
    return pace.compute_s(), whole_s, (dict(vars(dist.ProcessGroup)), dict(vars(dist.Work))) == before


def test_pace_counts_own_time_alone(run_ranks):
    (fast, fast_whole, fast_same), (slow, slow_whole, slow_same) = run_ranks(2)(paces)
    assert fast_same and slow_same
    assert fast_whole > 2.3 and slow_whole > 2.3
    assert 0.4 <= fast < 1.6 and 2.4 <= slow < 3.6
