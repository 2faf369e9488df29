"""bench prefill: our model's forward pass without head and gradients over lengths, one document each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import ops
from parallel.layout import Layout
from parallel.mesh import Mesh, device
from parallel.sequence.shard import Documents, positions_of
from sbtrain.bench.options import demand_positive
from sbtrain.bench.record import aligned, machine, peak_tflops, save, shown
from sbtrain.bench.shapes import model_config
from sbtrain.bench.timing import release_memory, spread, time_steps
from sbtrain.bench.weights import draw
from sbtrain.config.schema import ModelConfig, Precision
from sbtrain.config.typed import plain
from sbtrain.model.build import build_model, global_parameters
from sbtrain.model.flops import flops_per_token

FILE = "bench_prefill.json"


@dataclass(frozen=True)
class PrefillOptions:
    """Keys of `bench.py prefill`; those of the same name mean what they mean in TrainOptions.

    seq_len: lengths, in tokens. steps: timed passes of each, after warmup.
    """

    model: str = "7b"
    layers: int = 4
    seq_len: tuple[int, ...] = (32768, 131072)
    patterns: tuple[str, ...] = ("F", "LS")
    precision: Precision = Precision.bf16
    steps: int = 5
    warmup: int = 2
    peak_tflops: float = 0.0
    out: str = "runs/bench"


def bench_prefill(options: PrefillOptions, command: str) -> int:
    """Measure, print and save. Returns 0. Raises ValueError for bad options."""
    demand_positive(options, "layers", "seq_len", "steps", "warmup")
    models = [model_config(options.model, num_layers=options.layers, pattern=name) for name in options.patterns]
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
    save(options.out, FILE, report)
    for model in models:
        with Mesh.build(Layout()) as mesh:
            built = _filled(model, mesh, options)
            for num_tokens in options.seq_len:
                result = {"pattern": model.pattern, "num_tokens": num_tokens}
                result.update(_measure(built, model, num_tokens, options, peak=report["peak_tflops"]))
                report["results"].append(result)
                path = save(options.out, FILE, report)
            del built
        release_memory(device())
    print(f"{options.model} with {options.layers} layers on {report['machine']['device']}, {options.precision.name}\n")
    print(f"{summary(report)}\n\n{path}")
    return 0


@torch.no_grad()
def _filled(model: ModelConfig, mesh: Mesh, options: PrefillOptions):
    built = build_model(model, mesh, precision=options.precision, seq_len=max(options.seq_len))
    for name, parameter in global_parameters(built).items():
        parameter.copy_(draw(name, parameter.shape, parameter.device))
    return built.eval()


def _measure(built, model: ModelConfig, num_tokens: int, options: PrefillOptions, *, peak: float) -> dict:
    """Time one length. Out of memory is a result, too."""
    place = device()
    weights_bytes = release_memory(place)
    tokens = torch.randint(model.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).to(place)
    edges = torch.tensor([0, num_tokens], dtype=torch.int32, device=place)

    @torch.no_grad()
    def step(mark) -> None:
        # documents are made anew, as for every prompt: what kernels derive from them is part of the time
        cu_seqlens = edges.clone()
        built.decoder(built.embedding(tokens), Documents(cu_seqlens, positions_of(cu_seqlens)))
        mark("forward")

    try:
        timing = time_steps(step, num_warmup=options.warmup, num_steps=options.steps, device=place)
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}
    step_ms = spread(timing.steps_ms)
    parts = flops_per_token(model, num_tokens)
    tokens_per_s = num_tokens / step_ms["median"] * 1e3
    tflops = tokens_per_s * (sum(parts.values()) - parts["lm_head"]) / 1e12
    return {
        "step_ms": step_ms,
        "steps_ms": timing.steps_ms,
        "tokens_per_s": tokens_per_s,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "weights_bytes": weights_bytes,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if place.type == "cuda" else None,
    }


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
