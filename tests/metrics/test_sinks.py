"""Sinks: files after a resume, what the console shows, what is imported, what a user without a package reads."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbtrain.config.schema import LogConfig, Precision
from sbtrain.metrics import sinks as sinks_module
from sbtrain.metrics.sinks import Console, duration, open_jsonl, open_sinks, short


def step(number, **more):
    values = {
        "step": number, "tokens": number * 512, "stage": "ctx_256", "loss": 3.0 + 1 / number, "grad_norm": 1.5,
        "lr": 3e-4, "step_time_s": 5.0, "tokens_per_s_per_gpu": 51.2, "tflops_per_gpu": 0.1, "mfu": None,
        "peak_memory_bytes": 10**9, "world_size": 2,
    }  # fmt: skip
    return {**values, **more}


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_jsonl_resume_leaves_every_step_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = open_jsonl(path)
    for number in (1, 2, 3, 4):
        sink.write(step(number))
    assert steps_in(path) == [1, 2, 3, 4]  # flushed before close
    sink.close()
    before = path.read_text().splitlines()[:2]
    with open(path, "a") as file:
        file.write('{"step": 5, "tok')  # killed in the middle of a write
    sink = open_jsonl(path, resume_step=3)
    sink.write(step(3, loss=9.0))
    sink.close()
    assert steps_in(path) == [1, 2, 3]
    assert path.read_text().splitlines()[:2] == before
    open_jsonl(path, resume_step=1).close()
    assert path.read_text() == ""


def test_a_run_that_goes_back_writes_steps_again(tmp_path):
    log = LogConfig(tensorboard=True)
    sinks = open_sinks(log, tmp_path, name="n", num_steps=4, num_tokens=2048)
    for number in (1, 2, 3):
        sinks.write(step(number))
    assert [record["step"] for record in sinks.go_back(2)] == [2, 3]
    sinks.write(step(2, loss=9.0))
    sinks.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["loss"] == 9.0
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert open_sinks(log, tmp_path, name="n", num_steps=4, num_tokens=2048, rank=1).go_back(1) == []


def test_more_about_the_newest_step_joins_its_record(tmp_path):
    sinks = open_sinks(LogConfig(tensorboard=True), tmp_path, name="n", num_steps=4, num_tokens=2048)
    for number in (1, 2):
        sinks.write(step(number))
    sinks.add(2, {"checkpoint_wait_s": 0.5, "checkpoint_gb_per_s": float("inf")})
    sinks.add(1, {"checkpoint_wait_s": 9.0})  # not the newest: nothing is changed
    sinks.write(step(3))
    sinks.close()
    first, second, third = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (first, third) == (step(1), step(3))
    assert second == {**step(2), "checkpoint_wait_s": 0.5, "checkpoint_gb_per_s": None}


def test_jsonl_is_strict_json_and_exact(tmp_path):
    sink = open_jsonl(tmp_path / "metrics.jsonl")
    sink.write(step(1, loss=float("nan"), grad_norm=0.1 + 0.2, load={"max": float("inf")}))
    sink.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None
    assert record["load"] == {"max": None}
    assert record["grad_norm"] == 0.1 + 0.2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line():
    sink = sinks_module.JsonLines(Path("/dev/full"))
    with pytest.raises(ValueError, match=r"/dev/full: cannot write \(No space left on device\); free space") as caught:
        sink.write(step(1))
    assert "\n" not in str(caught.value)


def console_text(records, **options):
    stream = options.pop("stream", io.StringIO())
    console = Console(num_steps=4, num_tokens=2048, stream=stream, **options)
    for record in records:
        console.write(record)
    console.close()
    return stream.getvalue()


def test_console_is_aligned_and_plain_without_a_terminal():
    text = console_text([step(1, first_step=True), step(2, loss=12.0, mfu=0.4321), step(3, stage="ctx_512")])
    lines = text.splitlines()
    assert "\x1b" not in text
    assert "\r" not in text
    assert len({len(line) for line in lines if line}) == 1
    assert lines[0].split() == ["stage", "step", "tokens", "loss", "grad", "norm", "lr", "tok/s/GPU", "MFU", "ETA"]
    assert lines[1].split() == ["ctx_256", "1/4", "512/2.05k", "25%", "4.0000", "1.500", "3.00e-04", "51.2", "-", "-"]
    assert lines[2].split()[-2:] == ["43.2%", "10s"]  # 1024 tokens left at 2 x 51.2 tokens/s
    assert lines[3] == ""
    assert lines[4] == lines[0]


def test_models_that_spike_have_a_column_for_it():
    lines = console_text([step(1, spike_sparsity=0.6915), step(2, spike_sparsity=0.5)]).splitlines()
    assert lines[0].split()[-2:] == ["ETA", "sparsity"] and len({len(line) for line in lines}) == 1
    assert [line.split()[-1] for line in lines[1:]] == ["69.2%", "50.0%"]


def test_console_speaks_every_n_steps_and_at_the_end():
    text = console_text([step(n) for n in (1, 2, 3, 4)], every_steps=3)
    assert [line.split()[1] for line in text.splitlines()[1:]] == ["3/4", "4/4"]


def test_console_on_a_terminal_shows_the_steps_between():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = console_text([step(n) for n in (1, 2, 3)], every_steps=3, stream=Terminal())
    assert text.count("\r") > 2
    assert "1/4" in text
    assert "━" in text


def test_numbers_are_short():
    assert [short(n) for n in (51.23, 512, 6100, 50_200, 999_900, 1_250_000, 100_000_000_000)] == [
        "51.2", "512", "6.1k", "50.2k", "1M", "1.25M", "100B",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 42, 372, 11_100, 187_200)] == ["0s", "42s", "6m12s", "3h05m", "2d04h"]


def test_only_the_chosen_packages_are_imported(tmp_path):
    code = (
        "import sys; from sbtrain.config.schema import LogConfig; from sbtrain.metrics.sinks import open_sinks\n"
        f"open_sinks(LogConfig(), {str(tmp_path)!r}, name='x', num_steps=1, num_tokens=1).close()\n"
        "print([name for name in ('wandb', 'tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_other_ranks_write_nothing(tmp_path):
    open_sinks(LogConfig(), tmp_path, name="x", num_steps=1, num_tokens=1, rank=1).write(step(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "key"), [("wandb", "wandb"), ("torch.utils.tensorboard", "tensorboard")])
def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch, package, key):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^log.{key}: .*pip install {key}, or set log.{key}=false$"):
        open_sinks(LogConfig(**{key: True}), tmp_path, name="x", num_steps=1, num_tokens=1)


def test_tensorboard_reads_back_and_a_resume_replaces(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, loss in ((1, 1.0), (2, 5.0)):
        sink = sinks_module.TensorBoard(tmp_path, resume_step)
        for number in range(resume_step, 4):
            sink.write(step(number, loss=loss, spikes={"rate": 0.25}))
        sink.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 5.0), (3, 5.0)]
    assert events.Scalars("spikes/rate")[0].value == 0.25
    assert "stage" not in events.Tags()["scalars"]


def test_wandb_offline_keeps_the_numbers(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    log, config = LogConfig(wandb=True), {"seed": 0, "precision": Precision.fp32}
    sinks = open_sinks(log, tmp_path, name="demo", num_steps=2, num_tokens=1024, config=config)
    sinks.write(step(1, loss=2.125))
    sinks.close()
    (logged,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20  # wandb's own process writes the file after finish() has returned
    while b"2.125" not in logged.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"2.125" in logged.read_bytes()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"k" * 40 in path.read_bytes()]
