"""bench int8: reading a prompt and writing tokens behind it, on one device, by how the projections are computed.

    plain    activations as they are, float weights
    floats   activations replaced by their spikes, float weights: a spiking model without int8=true
    int8     counts and INT8 weights as integers: a spiking model with int8=true

The three have the same shape, that of a calibrated model: the gate of linear attention is one matrix. Weights are
random. A prompt is read as generation reads it, in chunks, up to the logits behind it and with all that decoding
starts from; tokens are decoded one by one, the logits of each included, sampling left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import ops
from parallel.layout import Layout
from parallel.mesh import Mesh, device
from sbtrain.bench.options import demand_positive
from sbtrain.bench.record import aligned, machine, save, shown
from sbtrain.bench.shapes import model_config
from sbtrain.bench.timing import release_memory, spread, time_steps
from sbtrain.bench.weights import draw
from sbtrain.config.model_schema import ModelConfig
from sbtrain.config.schema import Precision
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.config.typed import plain
from sbtrain.convert.calibrated import int8_model, int8_names
from sbtrain.inference.generate import CHUNK_TOKENS, advance, fork, prefill
from sbtrain.inference.int8 import fill_int8, swap
from sbtrain.model.build import build_model, global_parameters
from sbtrain.model.hybrid import HybridModel
from sbtrain.spiking.quantize import group_scales, quantize

FILE = "bench_int8.json"
KINDS = ("plain", "floats", "int8")


@dataclass(frozen=True)
class Int8Options:
    """Keys of `bench.py int8`.

    weights: which of plain, floats and int8, in this order. prompts: lengths. decode: tokens of a timed step.
    weight_group: channels that share a scale. spike_down_proj: the down projection spikes too. steps: timed, of
    prompt and of decoding, after warmup. The rest: as in `bench.py prefill`.
    """

    model: str = "7b"
    layers: int = 28
    pattern: str = "LS"
    weights: tuple[str, ...] = KINDS
    prompts: tuple[int, ...] = (8192, 32768)
    chunk_tokens: int = CHUNK_TOKENS
    decode: int = 32
    weight_group: int = 128
    spike_down_proj: bool = False
    precision: Precision = Precision.bf16
    steps: int = 5
    warmup: int = 2
    out: str = "runs/bench"


def bench_int8(options: Int8Options, command: str) -> int:
    """Measure, print and save, after every prompt. Returns 0. Raises ValueError for bad options."""
    demand_positive(options, "layers", "prompts", "chunk_tokens", "decode", "weight_group", "steps")
    unknown = next((kind for kind in options.weights if kind not in KINDS), None)
    if unknown is not None:
        raise ValueError(f"weights={unknown} is not known; choose from {', '.join(KINDS)}")
    spiking = SpikingConfig(weight_group=options.weight_group, spike_down_proj=options.spike_down_proj)
    shape = model_config(options.model, num_layers=options.layers, pattern=options.pattern)
    model = int8_model(shape, spiking)
    int8_names(model)
    report = {
        "benchmark": "int8",
        "command": command,
        "options": plain(options),
        "machine": machine(device()),
        "model": plain(model),
        "ops": ops.table(),
        "results": [],
    }
    with Mesh.build(Layout()) as mesh:
        if mesh.world_size > 1:
            raise ValueError(
                f"bench int8 is one process's, this is one of {mesh.world_size}; start it without torchrun"
            )
        for kind in options.weights:
            release_memory(device())
            built = _filled(model, kind, mesh, options)
            for num_tokens in options.prompts:
                report["results"].append({"weights": kind, **_measure(built, num_tokens, options)})
                path = save(options.out, FILE, report)
            del built
    print(f"{_title(report)}\n\n{summary(report)}\n\n{path}")
    return 0


class _Drawn:
    """INT8 weights of random models, by name."""

    def __init__(self, model: ModelConfig, shapes: dict[str, torch.Size]):
        self.int8_names, self._shapes, self._group = frozenset(int8_names(model)), shapes, model.spiking.weight_group

    def get(self, name: str) -> Tensor:
        return draw(name, self._shapes[name], device())

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self.get(name)
        scales = group_scales(weight, self._group)
        return quantize(weight, scales), scales


@torch.no_grad()
def _filled(model: ModelConfig, kind: str, mesh: Mesh, options: Int8Options) -> HybridModel:
    if kind == "plain":
        model = replace(model, spiking=replace(model.spiking, enabled=False))
    built = build_model(model, mesh, precision=options.precision, seq_len=model.window).eval()
    shapes = {name: parameter.shape for name, parameter in global_parameters(built).items()}
    weights = _Drawn(replace(model, spiking=replace(model.spiking, enabled=True)), shapes)
    projections = swap(built, sorted(weights.int8_names)) if kind == "int8" else {}
    fill_int8(built, projections, weights)
    return built


@torch.no_grad()
def _measure(built: HybridModel, num_tokens: int, options: Int8Options) -> dict:
    place = device()
    weights_bytes = release_memory(place)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(built.model_config.vocab_size, (num_tokens + options.decode,), generator=generator).to(place)
    prompt, written = ids[:num_tokens], ids[num_tokens:].split(1)
    cache = None

    def read(mark) -> None:
        nonlocal cache
        cache = prefill(built, prompt, chunk_tokens=options.chunk_tokens)[1]
        mark("prompt")

    def write(mark) -> None:
        own = fork(cache)
        for token in written:
            advance(built, token, own)
        mark("decode")

    on_gpu = place.type == "cuda"
    how = dict(num_warmup=options.warmup, num_steps=options.steps, device=place)
    result = {
        "num_tokens": num_tokens,
        "prompt_ms": spread(time_steps(read, **how).steps_ms),
        "decode_ms": spread([ms / options.decode for ms in time_steps(write, **how).steps_ms]),
        "weights_bytes": weights_bytes if on_gpu else None,
    }
    return {**result, "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}


def _title(report: dict) -> str:
    options = report["options"]
    what = f"{options['model']}, {options['layers']} layers {options['pattern']}, {options['precision']}"
    return f"{what}, groups of {options['weight_group']}, on {report['machine']['device']}; medians, min to max"


def summary(report: dict) -> str:
    """The results as a table."""
    header = ("weights", "prompt", "ms", "min to max", "tokens/s", "decode ms", "min to max", "tokens/s", "GiB", "peak")
    return aligned(header, [_row(result) for result in report["results"]])


def _row(result: dict) -> tuple[str, ...]:
    read, write = result["prompt_ms"], result["decode_ms"]
    memory = [result[key] for key in ("weights_bytes", "peak_memory_bytes")]
    return (
        result["weights"],
        str(result["num_tokens"]),
        f"{read['median']:.1f}",
        f"{read['min']:.1f} to {read['max']:.1f}",
        f"{result['num_tokens'] / read['median'] * 1e3:.0f}",
        f"{write['median']:.2f}",
        f"{write['min']:.2f} to {write['max']:.2f}",
        f"{1e3 / write['median']:.1f}",
        *(shown(size and size / 2**30, ".2f") for size in memory),
    )
