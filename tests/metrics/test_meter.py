"""Meter: speeds against a clock the test controls, and what stays out of the averages."""

from __future__ import annotations

import pytest

from sbtrain.metrics import meter as meter_module
from sbtrain.metrics.meter import Meter

KEYS = {
    "step", "tokens", "stage", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu",
    "mfu", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A list whose only number is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    return now


def record(meter, step, **more):
    values = dict(step=step, tokens=step * 4000, stage="ctx_8k", loss=2.5, grad_norm=1.0, lr=1e-4, step_tokens=4000)
    return meter.record(**{**values, **more})


def test_speed_flops_and_mfu(clock):
    meter = Meter(world_size=2, flops_per_token=6e9, peak_tflops=100.0)
    clock[0] += 10
    first = record(meter, 1)
    clock[0] += 0.5
    second = record(meter, 2)
    assert set(second) >= KEYS
    assert first["first_step"] is True
    assert "first_step" not in second
    assert second["step_time_s"] == pytest.approx(0.5)
    assert second["tokens_per_s_per_gpu"] == pytest.approx(4000)  # 4000 tokens / 0.5 s / 2 GPUs
    assert second["tflops_per_gpu"] == pytest.approx(24.0)  # 4000 x 6e9
    assert second["mfu"] == pytest.approx(0.24)
    assert second["peak_memory_bytes"] > 1_000_000


def test_averages_leave_out_the_first_step_and_interruptions(clock):
    meter = Meter(world_size=1, flops_per_token=1e9)
    assert meter.averages()["tokens_per_s_per_gpu"] is None
    for step, seconds in ((1, 60.0), (2, 1.0), (3, 3.0)):
        clock[0] += 500  # an evaluation
        meter.restart_clock()
        clock[0] += seconds
        record(meter, step)
    average = meter.averages()
    assert average["step_time_s"] == pytest.approx(2.0)
    assert average["tokens_per_s_per_gpu"] == pytest.approx(8000 / 4.0)
    assert average["mfu"] is None


def test_extra_metrics_are_added_and_may_not_replace(clock):
    meter = Meter(world_size=1, flops_per_token=1e9)
    clock[0] += 1
    assert record(meter, 1, extra={"expert_load": [0.5, 0.5]})["expert_load"] == [0.5, 0.5]
    with pytest.raises(AssertionError, match="loss"):
        record(meter, 2, extra={"loss": 0.0})
