"""bench prefill: our model's forward pass without head and gradients over lengths, one document each; under torchrun on
layouts of sequence parallelism, one after the other on the same ranks.

Every rank has seq_len tokens: those of its own prompt with sp=1, its shard of a prompt of N * seq_len with sp=N. So
layouts differ in what the ranks exchange and not in their work, but for full attention, which grows with the prompt.
All ranks are busy at once, and a pass takes as long as on the slowest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import ops
from parallel.collectives import together
from parallel.layout import Layout
from parallel.mesh import Mesh, device, start_distributed
from parallel.sequence.shard import shard_prompt
from sbtrain.bench.layouts import check_world, sequence_layout_of
from sbtrain.bench.options import demand_positive
from sbtrain.bench.record import aligned, machine, peak_tflops, save, shown
from sbtrain.bench.shapes import model_config
from sbtrain.bench.timing import release_memory, spread, time_steps
from sbtrain.bench.weights import draw
from sbtrain.config.rules import algorithm_problem
from sbtrain.config.schema import ModelConfig, Precision
from sbtrain.config.typed import plain
from sbtrain.model.build import build_model, global_parameters
from sbtrain.model.cache import Cache
from sbtrain.model.flops import flops_per_token
from sbtrain.model.hybrid import HybridModel

FILE = "bench_prefill.json"


@dataclass(frozen=True)
class PrefillOptions:
    """Keys of `bench.py prefill`; those of the same name mean what they mean in TrainOptions.

    seq_len: lengths, in tokens of a rank. steps: timed passes of each, after warmup. sp: over how many ranks a prompt
    is cut, N, or N:lasp2, N:zeco, N:ulysses; N alone leaves the choice to the links. cache: also leave every rank what
    decoding starts from.
    """

    model: str = "7b"
    layers: int = 4
    seq_len: tuple[int, ...] = (32768, 131072)
    patterns: tuple[str, ...] = ("F", "LS")
    precision: Precision = Precision.bf16
    steps: int = 5
    warmup: int = 2
    sp: tuple[str, ...] = ("1",)
    cache: bool = False
    peak_tflops: float = 0.0
    out: str = "runs/bench"


def bench_prefill(options: PrefillOptions, command: str) -> int:
    """Measure, print and save, the latter two on the first rank. Returns 0. Raises ValueError for bad options."""
    demand_positive(options, "layers", "seq_len", "steps")
    models = [model_config(options.model, num_layers=options.layers, pattern=name) for name in options.patterns]
    start_distributed()
    layouts = {name: sequence_layout_of(name) for name in options.sp}
    check_world(layouts)
    for model in models:
        for layout in layouts.values():
            _check_algorithms(model, layout, options)
    report = {
        "benchmark": "prefill",
        "command": command,
        "options": plain(options),
        "machine": machine(device()),
        "num_ranks": dist.get_world_size(),
        "peak_tflops": peak_tflops(device(), options.peak_tflops),
        "models": [plain(model) for model in models],
        "ops": ops.table(),
        "results": [],
    }
    _keep(options, report)
    for model in models:
        for name, layout in layouts.items():
            _bench_model(model, name, layout, options, report)
    path = _keep(options, report)
    if dist.get_rank() == 0:
        print(f"{_title(report)}\n\n{summary(report)}\n\n{path}")
    return 0


def _keep(options: PrefillOptions, report: dict) -> Path | None:
    """Save the report, on rank 0; all ranks raise what it raises."""
    return together(lambda: save(options.out, FILE, report) if dist.get_rank() == 0 else None)


def _title(report: dict) -> str:
    options, ranks = report["options"], report["num_ranks"]
    line = f"{options['model']} with {options['layers']} layers on {ranks} x {report['machine']['device']}"
    return f"{line}, {options['precision']}; tokens/s, TFLOP/s, MFU and GiB of one rank, its time that of the slowest"


def _longest(model: ModelConfig, layout: Layout, options: PrefillOptions) -> int:
    """For choices that go by lengths: of a prompt, or the window where that is longer, as when a user's is read."""
    return max(model.window, layout.sp * max(options.seq_len))


def _check_algorithms(model: ModelConfig, layout: Layout, options: PrefillOptions) -> None:
    problem = algorithm_problem(model, layout, seq_len=_longest(model, layout, options))
    if problem:
        raise ValueError(problem.removeprefix("layout."))


def _bench_model(model: ModelConfig, sp: str, layout: Layout, options: PrefillOptions, report: dict) -> None:
    """All lengths of one pattern on one layout; the report is saved after every one."""
    release_memory(device())
    with Mesh.build(layout) as mesh:
        built = _filled(model, mesh, options)
        for num_tokens in options.seq_len:
            result = {"pattern": model.pattern, "sp": sp, "num_tokens": layout.sp * num_tokens}
            result.update(tokens_per_rank=num_tokens, sp_choices=built.sp_choices)
            result.update(_measure(built, mesh, num_tokens, options, peak=report["peak_tflops"]))
            report["results"].append(result)
            _keep(options, report)
        del built


@torch.no_grad()
def _filled(model: ModelConfig, mesh: Mesh, options: PrefillOptions):
    built = build_model(model, mesh, precision=options.precision, seq_len=_longest(model, mesh.layout, options))
    for name, parameter in global_parameters(built).items():
        parameter.copy_(draw(name, parameter.shape, parameter.device))
    return built.eval()


def _measure(built: HybridModel, mesh: Mesh, num_tokens: int, options: PrefillOptions, *, peak: float) -> dict:
    """Time num_tokens on each rank. Out of memory is a result, too, where no other rank waits."""
    place, model, sp = device(), built.model_config, mesh.layout.sp
    weights_bytes = release_memory(place)
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    prompt = torch.randint(model.vocab_size, (sp * num_tokens,), generator=generator).to(place)
    cache = Cache() if options.cache else None

    @torch.no_grad()
    def step(mark) -> None:
        # documents are made anew, as for every prompt: what kernels derive from them is part of the time
        shard, documents, _ = shard_prompt(prompt, rank=mesh.sp_rank, size=sp, keepers=range(sp))
        built.hidden(shard, documents, cache)
        mark("forward")

    try:
        for _ in range(options.warmup):
            step(lambda part: None)
        dist.barrier()  # compiling takes some longer than others, and ranks with prompts of their own never meet
        timing = time_steps(step, num_warmup=0, num_steps=options.steps, device=place)
    except torch.OutOfMemoryError as error:
        if dist.get_world_size() > 1:
            raise
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}
    steps_ms = slowest(timing.steps_ms)
    parts = flops_per_token(model, sp * num_tokens)
    tokens_per_s = num_tokens / spread(steps_ms)["median"] * 1e3
    tflops = tokens_per_s * (sum(parts.values()) - parts["lm_head"]) / 1e12
    return {
        "step_ms": spread(steps_ms),
        "steps_ms": steps_ms,
        "tokens_per_s": tokens_per_s,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "weights_bytes": weights_bytes,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if place.type == "cuda" else None,
    }


def slowest(steps_ms: list[float]) -> list[float]:
    """Of each step the time on the slowest rank. Collective."""
    everyone = [steps_ms] * dist.get_world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, steps_ms)
    return [max(times) for times in zip(*everyone)]


def summary(report: dict) -> str:
    """The results as a table, and what auto chose."""
    times = ("ms", "min", "max")
    header = ("pattern sp", "prompts", "prompt tokens", "tokens/rank", *times, "tokens/s", "TFLOP/s", "MFU", "GiB")
    table = aligned(header, [_row(result, report["num_ranks"]) for result in report["results"]])
    chosen = {
        f"{result['pattern']} sp {result['sp']}, {symbol} layers: {choice}"
        for result in report["results"]
        for symbol, choice in result["sp_choices"].items()
    }
    return "\n".join([table, *([""] if chosen else []), *sorted(chosen)])


def _row(result: dict, num_ranks: int) -> tuple[str, ...]:
    prompts = num_ranks * result["tokens_per_rank"] // result["num_tokens"]
    sizes = (f"{prompts}", f"{result['num_tokens']}", f"{result['tokens_per_rank']}")
    start = (f"{result['pattern']} {result['sp']}", *sizes)
    if "error" in result:
        return (*start, *("-",) * 6, "out of memory")
    memory = result["peak_memory_bytes"]
    return (
        *start,
        *(f"{result['step_ms'][key]:.1f}" for key in ("median", "min", "max")),
        f"{result['tokens_per_s']:.0f}",
        f"{result['tflops']:.1f}",
        shown(result["mfu"], ".1%"),
        shown(memory and memory / 2**30, ".1f"),
    )
