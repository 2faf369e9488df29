"""INT8 weights for a trained model: `launch/calibrate.py`.

Layer by layer and, inside one, q, k, v and the gate | output projection | gate, up | down: what a projection reads
while its weights are rounded comes from projections that are rounded already, and from spikes (GPTQ's order;
SpikingBrain report, section 3.3). A projection that model.spiking leaves out is not rounded either.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn
from torch.cuda import max_memory_allocated

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import Row
from sbtrain.config.model_schema import ModelConfig
from sbtrain.config.schema import Precision
from sbtrain.config.spiking_rules import check_spiking
from sbtrain.config.spiking_schema import LARGEST_K, SpikingConfig
from sbtrain.convert.calibrated import MergedGates, Writer, fingerprint_of, int8_model, int8_names
from sbtrain.convert.names import projection_of
from sbtrain.data import tokenizer as tokenizers
from sbtrain.data.pack import Stream, make_row, shuffled
from sbtrain.data.source import open_corpus
from sbtrain.data.tokenizer import Tokenizer, check_vocabulary
from sbtrain.inference.corpus import check_data, excerpt, is_text
from sbtrain.inference.layerwise import HiddenStates
from sbtrain.inference.load import Source, Where, calibrated_folder, check_alone, open_source
from sbtrain.inference.options import build, check_keys, split
from sbtrain.spiking.gptq import DAMPING, Hessian, gptq
from sbtrain.spiking.quantize import dequantize, group_scales, output_error, quantize

ORDER = (("qkv", "gate"), ("proj",), ("gate_up",), ("down",))
METHODS = ("gptq", "rtn")


@dataclass(frozen=True)
class Calibration:
    """How weights are rounded.

    data: prefix of prepare_data's files, or a text file; samples of seq_len tokens are taken from it, in an order that
    is always the same. method: gptq, or rtn (round to nearest). out: a folder that does not exist; empty is
    calibrated/step_N in the run, calibrated in a model's folder. text_key: of json lines. k, weight_group,
    spike_down_proj: in place of model.spiking's; None is those.
    """

    data: str
    method: str = "gptq"
    samples: int = 128
    seq_len: int = 2048
    out: str = ""
    text_key: str = "text"
    k: Optional[float] = None
    weight_group: Optional[int] = None
    spike_down_proj: Optional[bool] = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method={self.method} is not known; choose one of {', '.join(METHODS)}")
        for key, least in {"samples": 1, "seq_len": 2, "weight_group": 1}.items():
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}")
        if self.k is not None and not 0 < self.k <= LARGEST_K:
            raise ValueError(f"k={self.k} must be positive and at most {LARGEST_K:g}: the spikes of a mean activation")

    def of(self, spiking: SpikingConfig) -> SpikingConfig:
        """model.spiking with what is given here."""
        own = {"k": self.k, "weight_group": self.weight_group, "spike_down_proj": self.spike_down_proj}
        given = {key: value for key, value in own.items() if value is not None}
        return replace(spiking, **given, **({"layer_k": {}} if "k" in given else {}))


def calibrate(arguments: Sequence[str]) -> Path:
    """Calibrate as key=value arguments say, print the errors of each layer, and return the folder that was written.

    Raises ValueError, one line naming the key and the fix, before weights are read where that is possible.
    """
    given = split(arguments)
    check_keys(given, Where, Calibration)
    where, how = build(Where, given), build(Calibration, given)
    where.check()
    where.refuse_int8("calibration makes the INT8 weights")
    check_data(how.data)
    source = open_source(where)
    out = Path(how.out) if how.out else calibrated_folder(where, source)
    if out.exists():
        raise ValueError(f"out={out} exists; remove it or give out= another folder")
    model = _model(source, how)
    tokenizer = tokenizers.load(source.tokenizer_dir)
    check_vocabulary(tokenizer, model.vocab_size)
    rows = calibration_rows(how, tokenizer)
    with Mesh.build(Layout()) as mesh:
        check_alone(mesh, "calibration")
        with Writer(out) as writer:
            _calibrate(source, model, rows, how, where, mesh, writer)
    return out


def calibration_rows(how: Calibration, tokenizer: Tokenizer) -> list[Row]:
    """The samples, a row each. Raises ValueError where the data has fewer, or is of another tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        prefix, tokens = how.data, how.samples * how.seq_len
        if is_text(how.data):
            prefix = excerpt(how.data, Path(scratch) / "text", tokenizer, tokens=tokens, text_key=how.text_key)
        corpus = open_corpus(prefix, name="calibration", tokenizer_sha256=tokenizer.sha256)
        have = corpus.num_tokens // how.seq_len
        if have < how.samples:
            advice = f"samples={have}, " if have else ""
            raise ValueError(
                f"data={how.data} has {have} samples of {how.seq_len} tokens, {how.samples} were asked for; give more "
                f"text, {advice}or a smaller seq_len="
            )
        stream = Stream(corpus, order=shuffled(corpus, seed="calibration"))
        return [make_row([stream.sample(i, seq_len=how.seq_len)]) for i in range(how.samples)]


def _model(source: Source, how: Calibration) -> ModelConfig:
    """The INT8 model; says so where the source's does not spike. Raises ValueError where there can be none."""
    spiking = how.of(source.config.spiking)
    model = int8_model(source.config, spiking)
    check_spiking(model)
    if not int8_names(model):
        raise ValueError("model.spiking.skip leaves out every projection; nothing is left to calibrate")
    if not source.config.spiking.enabled:
        print(f"model.spiking.enabled is false here; calibrated as a model that spikes, k={spiking.k:g}", flush=True)
    return model


def _calibrate(
    source: Source, model: ModelConfig, rows: list[Row], how: Calibration, where: Where, mesh: Mesh, writer: Writer
) -> None:
    default = Precision.bf16 if mesh.device.type == "cuda" else Precision.fp32
    precision = Precision(where.precision) if where.precision else default
    reader = MergedGates(source.reader, source.config)
    states, errors = HiddenStates(reader, model, mesh, rows, precision=precision), {}
    for index in range(model.num_layers):
        weights, of_layer = calibrate_layer(states, index, method=how.method)
        writer.add(index, weights)
        errors |= of_layer
        print(f"layer {index + 1}/{model.num_layers}  {_line(of_layer)}", flush=True)
    writer.finish(
        model,
        {
            "origin": str(source.origin),
            "method": how.method,
            "data": how.data,
            "samples": how.samples,
            "seq_len": how.seq_len,
            "damping": DAMPING,
            "fingerprint": fingerprint_of(reader, model),
            "errors": errors,
        },
    )
    means = {method: sum(error[method] for error in errors.values()) / len(errors) for method in _methods(how.method)}
    print("mean output error: " + ", ".join(f"{method} {mean:.3e}" for method, mean in means.items()), flush=True)
    if mesh.device.type == "cuda":
        print(f"device memory at most {max_memory_allocated(mesh.device) / 2**30:.2f} GiB", flush=True)


@torch.no_grad()
def calibrate_layer(
    states: HiddenStates, index: int, *, method: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict[str, float]]]:
    """Round the weights of one layer and move the samples through it.

    Returns (name -> (int8 [F, D], scales [F, D / group, 1]), name -> {method: error of what the projection puts out,
    relative}). Errors of gptq come with those of rtn beside them.
    """
    model, layer, prefix = states.model, states.layer(index), f"decoder.layers.{index}."
    names = [name for name in int8_names(model) if name.startswith(prefix)]
    weights, errors = {}, {}
    for group in ORDER:
        modules = {
            name: layer.get_submodule(name.removeprefix(prefix).removesuffix(".weight"))
            for name in names
            if projection_of(name)[0] in group
        }
        hessians = _hessians(states, layer, modules)
        for name, module in modules.items():
            try:
                hessian, group = hessians.pop(name).matrix, model.spiking.weight_group
                rounded = _rounded(states.weight(name), hessian, method, group)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            weights[name], errors[name] = rounded
            module.weight.copy_(dequantize(*weights[name]))
            weights[name] = tuple(tensor.cpu() for tensor in weights[name])
    states.advance(layer)
    return weights, errors


def _hessians(states: HiddenStates, layer: nn.Module, modules: dict[str, nn.Module]) -> dict[str, Hessian]:
    device = states.mesh.device
    hessians = {name: Hessian(module.weight.shape[1], device=device) for name, module in modules.items()}
    if modules:
        states.inputs_of(layer, modules, lambda name, x: hessians[name].add(x))
    return hessians


def _rounded(
    weight: Tensor, hessian: Tensor, method: str, group: int
) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
    """An fp32 weight by one method, and its errors."""
    pairs = {"gptq": gptq(weight, hessian, group=group)} if method == "gptq" else {}
    scales = group_scales(weight, group)
    pairs["rtn"] = quantize(weight, scales), scales
    return pairs[method], {each: output_error(weight, dequantize(*pair), hessian) for each, pair in pairs.items()}


def _methods(method: str) -> tuple[str, ...]:
    """The methods whose errors are measured."""
    return METHODS if method == "gptq" else ("rtn",)


def _line(errors: dict[str, dict[str, float]]) -> str:
    parts = []
    for name, error in errors.items():
        branch = f"{name.split('.')[5]}." if ".branches." in name else ""
        measured = ", ".join(f"{method} {value:.3e}" for method, value in error.items())
        parts.append(f"{branch}{projection_of(name)[0]} {measured}")
    return "; ".join(parts)
