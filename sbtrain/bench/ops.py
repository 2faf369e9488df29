"""bench ops: every op x backend x installed peer in one process: time, rate, error, memory; table, JSON and a chart.

The versions of a case take turns, on the same random inputs. What a version cannot do is a row with its reason.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict, dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Iterator

import torch

import ops
from ops.discover import descriptors
from parallel.mesh import device
from sbtrain.bench.ops_case import PASSES, Case
from sbtrain.bench.ops_ceilings import ceilings
from sbtrain.bench.ops_chart import write_chart
from sbtrain.bench.ops_contest import Contest
from sbtrain.bench.ops_measure import Settings, Stopwatch
from sbtrain.bench.ops_shapes import cases
from sbtrain.bench.ops_table import line, summary
from sbtrain.bench.ops_tune import DeviceLost, Tuner, progress
from sbtrain.bench.ops_tune import summary as tune_summary
from sbtrain.bench.options import demand_positive
from sbtrain.bench.record import machine, save
from sbtrain.bench.shapes import model_config
from sbtrain.bench.timing import release_memory
from sbtrain.config.typed import plain

FILE, CHART, TUNE_FILE = "bench_ops.json", "bench_ops.png", "bench_ops_tune.json"


class Dtype(Enum):
    """What inputs are stored in."""

    bf16 = torch.bfloat16
    fp16 = torch.float16
    fp32 = torch.float32


@dataclass(frozen=True)
class OpsOptions:
    """Keys of `bench.py ops`.

    ops, backends: names; without them all that can be had here. lengths: tokens. peers: measure other packages, too.
    passes: forward (no gradients), both (forward and backward). model: recipe (7b: Qwen2.5-7B) or `tiny` whose shapes
    are taken. steps: timed calls, after warmup; fewer where a call is slow. error_tokens: longest length at which the
    error against the float64 reference is measured. time_limit_s: for the first call of a version, with what it
    compiles and tunes. out: folder of bench_ops.json and bench_ops.png.

    tune: search the tiles of our kernels on this device instead and write them into their tune files, and what was
    tried into bench_ops_tune.json. tune_limit_s: for one kernel. kernels: their names in the tune files, or all.
    """

    ops: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    backends: tuple[str, ...] = ()
    peers: bool = True
    passes: tuple[str, ...] = PASSES
    model: str = "7b"
    dtype: Dtype = Dtype.bf16
    steps: int = 20
    warmup: int = 3
    error_tokens: int = 8192
    time_limit_s: float = 120.0
    seed: int = 0
    tune: bool = False
    tune_limit_s: float = 300.0
    kernels: tuple[str, ...] = ()
    out: str = "runs/bench"


def bench_ops(options: OpsOptions, command: str) -> int:
    """Measure, print and save. Returns 0, or 1 if a backend of ours failed or is too far from the reference.

    Raises ValueError for bad options.
    """
    chosen = chosen_cases(options)
    gc.freeze()  # memory is given back often: looking through all of torch would take half a second each time
    try:
        return _bench(chosen, options, command)
    finally:
        gc.unfreeze()


def _bench(chosen: list[Case], options: OpsOptions, command: str) -> int:
    settings = Settings(
        device(), options.dtype.value, options.steps, options.warmup, options.time_limit_s, options.seed
    )
    report = {
        "benchmark": "ops",
        "command": command,
        "options": plain(options),
        "machine": machine(device()),
        "ops": ops.table(),
    }
    if options.tune:
        return _tune(chosen, options, settings, report)
    report.update(ceilings=ceilings(device(), settings.dtype), rows=[])
    save(options.out, FILE, report)
    print(title(report), flush=True)
    try:
        for row in _rows(chosen, options, settings, report["ceilings"]):
            report["rows"].append(row)
            save(options.out, FILE, report)
            print(line(row), flush=True)
    finally:  # an interrupted run shows what it has
        write_chart(report["rows"], Path(options.out) / CHART)
        print(f"\n{summary(report['rows'])}\n\n{Path(options.out) / FILE}, {Path(options.out) / CHART}", flush=True)
    return 1 if any(row["ours"] and row["wrong"] for row in report["rows"]) else 0


def _rows(chosen: list[Case], options: OpsOptions, settings: Settings, limits: dict) -> Iterator[dict]:
    stopwatch = Stopwatch(settings.device)
    for case in chosen:
        contest = Contest(case, settings, stopwatch, limits, backends=options.backends, peers=options.peers)
        yield from contest.rows(options.lengths, options.passes, error_tokens=options.error_tokens)
        release_memory(settings.device)


def _tune(chosen: list[Case], options: OpsOptions, settings: Settings, report: dict) -> int:
    """Search and write tiles, op by op; what was tried is saved after every candidate."""
    if settings.device.type != "cuda":
        raise ValueError("tune=true needs a GPU; without tune= every op is measured on any device")
    finished, stopwatch = [], Stopwatch(settings.device)
    report.update(kernels=[], not_tuned={})
    source = f"{report['command']}, {date.today()}"
    for op in dict.fromkeys(case.op for case in chosen):
        cases_of_op = [case for case in chosen if case.op == op]
        try:
            limits = dict(tune_limit_s=options.tune_limit_s, kernels=options.kernels)
            tuner = Tuner(op, cases_of_op, settings, stopwatch, **limits)
        except ValueError as error:
            report["not_tuned"][op] = str(error)
            continue
        tuner.prepare(options.lengths, options.error_tokens)
        try:
            for search in tuner.searches(source):
                if search.finished:
                    finished.append(search)
                    report["kernels"].append(asdict(search))
                save(options.out, TUNE_FILE, {**report, "searching": None if search.finished else asdict(search)})
                print(progress(search), flush=True)
        except DeviceLost as error:
            print(f"error: {error}; leave it out of SPACE in the op's backend file", file=sys.stderr)
            return 1
        del tuner, search
        release_memory(settings.device)
    path = save(options.out, TUNE_FILE, report)
    reasons = [f"  {op}: {why}" for op, why in report["not_tuned"].items()]
    print("\n".join(["", tune_summary(finished), "", *reasons, f"{path}"]))
    return 0


def chosen_cases(options: OpsOptions) -> list[Case]:
    """The cases of the wanted ops. Raises ValueError, one line, for options that cannot be."""
    demand_positive(options, "lengths", "steps", "warmup", "error_tokens")
    for key in ("time_limit_s", "tune_limit_s"):
        if getattr(options, key) <= 0:
            raise ValueError(f"{key}={getattr(options, key)} must be more than 0")
    model = model_config(options.model, num_layers=2, pattern="LS")
    all_cases = cases(model)
    for key, given, known in (
        ("ops", options.ops, list(dict.fromkeys(case.op for case in all_cases))),
        ("backends", options.backends, sorted(descriptors())),
        ("passes", options.passes, list(PASSES)),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"{key}={unknown[0]} is not known; choose from: {', '.join(known)}")
    return [case for case in all_cases if not options.ops or case.op in options.ops]


def title(report: dict) -> str:
    """Machine and ceilings, to print first."""
    facts, limits = report["machine"], report["ceilings"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    return (
        f"{facts['device']}, torch {facts['torch']}, {packages}; inputs in {report['options']['dtype']}\n"
        f"ceilings measured here: copy {limits['copy_gb_per_s']:.0f} GB/s (read + written), "
        f"{limits['gemm_dtype']} product of {limits['gemm_size']}³ {limits['gemm_tflops']:.1f} TFLOP/s\n"
    )
