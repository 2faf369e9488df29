"""Times of steps and parts, on a CPU whose clock is replaced by a count."""

import itertools

import pytest
import torch

from sbtrain.bench import timing

CPU = torch.device("cpu")


def test_parts_add_up_to_steps_and_the_warmup_is_left_out(monkeypatch):
    """The clock advances by what a step says it takes."""
    now, calls = [0.0], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def step(mark):
        number = next(calls)
        now[0] += 100 if number < 2 else 1  # seconds; the first two compile
        mark("forward_backward")
        now[0] += 0.25 * number
        mark("optimizer")
        return number

    timed = timing.time_steps(step, num_warmup=2, num_steps=3, device=CPU)
    assert timed.results == [0, 1, 2, 3, 4]
    assert timed.parts_ms == {"forward_backward": [1000] * 3, "optimizer": [500, 750, 1000]}
    assert timed.steps_ms == [1500, 1750, 2000]
    assert timing.spread(timed.steps_ms) == {"median": 1750, "min": 1500, "max": 2000}


@pytest.mark.gpu
def test_events_measure_the_device_and_not_the_host():
    """A long kernel is launched in microseconds; the step takes as long as the kernel does."""
    device = torch.device("cuda")
    work = torch.randn(8192, 8192, device=device)

    def step(mark):
        for _ in range(20):
            torch.mm(work, work)
        mark("all")

    timed = timing.time_steps(step, num_warmup=2, num_steps=3, device=device)
    assert min(timed.steps_ms) > 20 * 2 * 8192**3 / 1e15 * 1e3  # no GPU does a fp32 PFLOP/s
