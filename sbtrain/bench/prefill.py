"""bench prefill: our model's forward pass without head and gradients over lengths, one document each.

Under sp every rank has a shard of the document; a pass takes as long as on the slowest of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

import ops
from parallel.collectives import together
from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from parallel.mesh import Mesh, check_one_row, device
from parallel.sequence.shard import shard_prompt
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

    seq_len: lengths, in tokens. steps: timed passes of each, after warmup. sp: processes (torchrun's) that share a
    document, and sp_algorithm, how. cache: also leave every rank what decoding starts from.
    """

    model: str = "7b"
    layers: int = 4
    seq_len: tuple[int, ...] = (32768, 131072)
    patterns: tuple[str, ...] = ("F", "LS")
    precision: Precision = Precision.bf16
    steps: int = 5
    warmup: int = 2
    sp: int = 1
    sp_algorithm: SequenceAlgorithms = SequenceAlgorithms(S=SequenceAlgorithm.halo, L=SequenceAlgorithm.lasp2)
    cache: bool = False
    peak_tflops: float = 0.0
    out: str = "runs/bench"


def bench_prefill(options: PrefillOptions, command: str) -> int:
    """Measure, print and save, the latter on the first rank. Returns 0. Raises ValueError for bad options."""
    demand_positive(options, "layers", "seq_len", "steps", "warmup", "sp")
    models = [model_config(options.model, num_layers=options.layers, pattern=name) for name in options.patterns]
    layout = Layout(sp=options.sp, sp_algorithm=options.sp_algorithm)
    check_one_row(layout)
    _check_shards(models, layout, options)
    first = dist.get_rank() == 0
    report = {
        "benchmark": "prefill",
        "command": command,
        "options": plain(options),
        "machine": machine(device()),
        "peak_tflops": peak_tflops(device(), options.peak_tflops),
        "models": [plain(model) for model in models],
        "ops": ops.table(),
        "results": [],
    }
    path = together(lambda: save(options.out, FILE, report) if first else None)
    for model in models:
        with Mesh.build(layout) as mesh:
            built = _filled(model, mesh, options)
            for num_tokens in options.seq_len:
                result = {"pattern": model.pattern, "num_tokens": num_tokens}
                result.update(_measure(built, mesh, num_tokens, options, peak=report["peak_tflops"]))
                report["results"].append(result)
                if first:
                    save(options.out, FILE, report)
            del built
        release_memory(device())
    if first:
        print(f"{_title(report)}\n\n{summary(report)}\n\n{path}")
    return 0


def _title(report: dict) -> str:
    options, place = report["options"], report["machine"]["device"]
    line = f"{options['model']} with {options['layers']} layers on {place}, {options['precision']}"
    if options["sp"] == 1:
        return line
    algorithms = ", ".join(f"{mixer} {name}" for mixer, name in options["sp_algorithm"].items())
    return f"{line}, sp {options['sp']} ({algorithms}); TFLOP/s, MFU and GiB of one rank"


def _check_shards(models: list[ModelConfig], layout: Layout, options: PrefillOptions) -> None:
    odd = [num_tokens for num_tokens in options.seq_len if num_tokens % layout.sp]
    if odd:
        raise ValueError(f"sp={layout.sp} does not divide seq_len={odd[0]}; choose lengths that it divides")
    for model in models:
        problem = algorithm_problem(model, layout, seq_len=max(model.window, *options.seq_len))
        if problem:
            raise ValueError(problem.removeprefix("layout."))


@torch.no_grad()
def _filled(model: ModelConfig, mesh: Mesh, options: PrefillOptions):
    built = build_model(model, mesh, precision=options.precision, seq_len=max(options.seq_len))
    for name, parameter in global_parameters(built).items():
        parameter.copy_(draw(name, parameter.shape, parameter.device))
    return built.eval()


def _measure(built: HybridModel, mesh: Mesh, num_tokens: int, options: PrefillOptions, *, peak: float) -> dict:
    """Time one length. Out of memory is a result, too, of one rank; of several it would leave the others waiting."""
    place, model = device(), built.model_config
    weights_bytes = release_memory(place)
    tokens = torch.randint(model.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).to(place)
    cache = Cache() if options.cache else None

    @torch.no_grad()
    def step(mark) -> None:
        # documents are made anew, as for every prompt: what kernels derive from them is part of the time
        shard, documents, _ = shard_prompt(tokens, rank=mesh.sp_rank, size=options.sp, keepers=range(options.sp))
        built.hidden(shard, documents, cache)
        mark("forward")

    try:
        timing = time_steps(step, num_warmup=options.warmup, num_steps=options.steps, device=place)
    except torch.OutOfMemoryError as error:
        if options.sp > 1:
            raise
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}
    steps_ms = slowest(timing.steps_ms)
    step_ms = spread(steps_ms)
    parts = flops_per_token(model, num_tokens)
    tokens_per_s = num_tokens / step_ms["median"] * 1e3
    tflops = tokens_per_s * (sum(parts.values()) - parts["lm_head"]) / 1e12 / options.sp
    return {
        "step_ms": step_ms,
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
    """The results as a table."""
    header = ("pattern", "tokens", "ms", "min", "max", "tokens/s", "TFLOP/s", "MFU", "GiB")
    return aligned(header, [_row(result) for result in report["results"]])


def _row(result: dict) -> tuple[str, ...]:
    start = (result["pattern"], f"{result['num_tokens']}")
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
