"""Health: slow ranks by their own time, memory, disk and clocks, each told once."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist

from parallel.mesh import start_distributed
from parallel.pace import Pace
from run_case import curve, run_until, tiny_recipe, write_inputs
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.run_dir import Exit
from sbtrain.config.schema import WatchConfig
from sbtrain.train.health import KEPT, LEAST, Health, Measured, keep_clocks

CPU = torch.device("cpu")


def health(tmp_path, kinds: list[int], **options) -> Health:
    """Of ranks on hosts a and b in turn, judged here without them. kinds: pipeline stage by rank."""
    start_distributed()
    one = Health(WatchConfig(), tmp_path, **options)
    one.begin(SimpleNamespace(device=CPU, world_size=1, pp_rank=0))
    one._kinds, one._hosts = kinds, ["ab"[rank % 2] for rank in range(len(kinds))]
    one._seconds = [deque(maxlen=KEPT) for _ in kinds]
    return one


def test_a_slow_rank_is_named_once_and_again_when_it_recovers(tmp_path, capsys):
    one = health(tmp_path, [0] * 8)
    for count in range(1, KEPT + 1):
        found = one.judge([Measured(1.6 if rank == 5 else 1.0 + 0.01 * rank) for rank in range(8)])
        assert (found["slowest_rank"], found["slowest_ratio"]) == (5, pytest.approx(1.6 / 1.03))
        assert found["compute_time_s"] == pytest.approx(1.03)
        assert (count == LEAST) == ("slow rank: rank 5 (host b) computes 1.55 times" in capsys.readouterr().out)
    for _ in range(KEPT):
        one.judge([Measured(1.0)] * 8)
    assert "rank 5 (host b) is no longer slow: 1.00 times" in capsys.readouterr().out


def test_one_slow_measurement_is_no_slow_rank(tmp_path, capsys):
    one = health(tmp_path, [0] * 4)
    for step in range(KEPT):
        one.judge([Measured(3.0 if rank == step % 4 else 1.0) for rank in range(4)])
    assert capsys.readouterr().out == ""


def test_pipeline_stages_are_compared_with_their_like(tmp_path, capsys):
    """The stage of the head computes longer on all of its ranks, which is no fault of theirs."""
    one = health(tmp_path, [0, 0, 1, 1])
    for _ in range(KEPT):
        found = one.judge([Measured(1.0), Measured(1.0), Measured(2.0), Measured(3.0)])
    assert found["slowest_rank"] == 3 and found["slowest_ratio"] == pytest.approx(1.5)
    assert capsys.readouterr().out.count("slow rank: rank 3") == 1


def test_memory_disk_and_clocks(tmp_path, capsys):
    kept = []
    one = health(tmp_path, [0] * 4, checkpoint_bytes=10**10, keep_clocks=kept.append)
    fine = [Measured(1.0, 0.5, 0.0, 1e12, 100.0), *[Measured(1.0, 0.6, 0.0, math.nan, 100.01)] * 3]
    found = one.judge(fine)
    assert (found["memory_share"], found["disk_free_bytes"]) == (0.6, 10**12)
    assert found["clock_skew_s"] == pytest.approx(0.01) and kept == [{"a": -0.005, "b": 0.005}]
    assert capsys.readouterr().out == ""
    for _ in range(4):
        ranks = [Measured(1.0, 0.97, 2.0, 1.5e10, 100.0 + 9 * (rank % 2)) for rank in range(4)]
        found = one.judge(ranks)
    text = capsys.readouterr().out
    assert text.count("memory: rank 0 (host a) has used 97.0% of its GPU (watch.memory_share=0.95)") == 1
    assert text.count("memory: rank 0 (host a) was short of memory 2 times") == 1
    assert text.count("disk: 15.0 GB are free") == 1 and "less than two checkpoints of 10.0 GB" in text
    assert text.count("clocks: host b is 9.0 s ahead of host a") == 1
    assert len(kept) == 2 and kept[1]["b"] - kept[1]["a"] == pytest.approx(9.0)


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def paces(rank: int) -> tuple[float, float, bool]:
    """Rank 1 works 2 s longer and is waited for by both kinds of calls: own seconds, whole seconds, torch as before."""
    before = dict(vars(dist.ProcessGroup)), dict(vars(dist.Work))
    x = torch.ones(4)
    dist.barrier()
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
    assert fast_whole > 2.0 and slow_whole > 2.3
    assert fast >= 0.4 and slow >= 2.4
    assert fast <= fast_whole - 1.2 and fast <= slow - 1.2  # what else the machine does counts as their own time


def test_measuring_and_saving_in_every_step_changes_nothing(tmp_path, run_ranks):
    """On data-parallel ranks, on a pipeline and on shards; the ranks agree on when, and the ledger keeps the clocks."""
    write_inputs(tmp_path)
    quiet = ("evaluation.tokens=0", "stages.ctx_32.tokens=512")
    busy = ("watch.measure_every_steps=1", "checkpoint.every_steps=1")
    for name, options in (("busy", busy), ("idle", ("watch.measure_every_steps=0",))):
        assert run_ranks(2)(run_until, tiny_recipe(tmp_path, name, *quiet, *options)) == [Exit.DONE] * 2
    assert curve(tmp_path / "busy") == curve(tmp_path / "idle")
    records = [json.loads(line) for line in (tmp_path / "busy/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "compute_time_s" in record] == [3, 4, 7, 8, 11, 12]
    assert all(0 < record.get("compute_time_s", 1e-3) <= record["step_time_s"] for record in records)
    assert list(json.loads((tmp_path / "busy/ledger.json").read_text())["clock_skew_s"].values()) == [0.0]


def test_a_full_disk_does_not_keep_clocks_and_stops_nothing(tmp_path, monkeypatch):
    """But who has lost the run directory to another job may not write there."""
    start_distributed()
    ledger = Ledger(tmp_path)
    keep_clocks(ledger, lambda: None, {"a": 0.5})
    assert json.loads(ledger.path.read_text())["clock_skew_s"] == {"a": 0.5}
    monkeypatch.setattr("sbtrain.checkpoint.ledger.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    keep_clocks(ledger, lambda: None, {"a": 0.7})

    def taken() -> None:
        raise ValueError("taken over")

    with pytest.raises(ValueError, match="taken over"):
        keep_clocks(ledger, taken, {"a": 0.9})
    assert json.loads(ledger.path.read_text())["clock_skew_s"] == {"a": 0.5}


@pytest.mark.parametrize("num_ranks", [2, 3, 64])
def test_noise_is_no_slow_rank_and_a_slow_one_is(num_ranks, tmp_path, capsys):
    """Every rank is late by chance in a tenth of the steps, and one always by half."""
    random, one = numpy.random.default_rng(0), health(tmp_path, [0] * num_ranks)
    for slow in (None, num_ranks - 1):
        for _ in range(30):
            seconds = 1 + 0.02 * random.random(num_ranks) + 2.0 * (random.random(num_ranks) < 0.1)
            seconds[[] if slow is None else [slow]] += 0.5
            found = one.judge([Measured(float(each)) for each in seconds])
        text = capsys.readouterr().out
        assert [line.split()[4] for line in text.splitlines() if "slow rank:" in line] == (
            [] if slow is None else [str(slow)]
        )
    assert (found["slowest_rank"], found["slowest_ratio"]) == (num_ranks - 1, pytest.approx(1.5, abs=0.05))


def test_figures_near_a_limit_are_told_once(tmp_path, capsys):
    one = health(tmp_path, [0] * 4, checkpoint_bytes=10**10)
    for step in range(40):
        above = 0.02 * (-1) ** (step // 5)
        ranks = [Measured(1.0 + (0.3 + above) * (rank == 2), 0.95 + above, 0.0, 2e10 * (1 - above), 5.0 * (1 + above)
                          * (rank % 2)) for rank in range(4)]  # fmt: skip
        one.judge(ranks)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["clocks:", "slow", "memory:", "disk:"] or len(lines) == 4
    assert all(limit in "".join(lines) for limit in ("slow_ratio=1.3", "memory_share=0.95", "clock_skew_s=5"))
