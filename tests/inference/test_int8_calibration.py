"""Calibration: what a layer sees while its weights are rounded, how much memory that takes, and what is refused."""

from __future__ import annotations

import json
import runpy
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import shard_row
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MetaConfig, PairConfig
from sbtrain.config.schema import Precision
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.convert.calibrated import Calibrated, MergedGates, int8_model
from sbtrain.data import tokenizer as tokenizers
from sbtrain.inference import layerwise
from sbtrain.inference.calibrate import Calibration, calibrate, calibrate_layer, calibration_rows
from sbtrain.inference.layerwise import HiddenStates
from sbtrain.inference.load import Where, load_model
from sbtrain.model.build import global_parameters
from sbtrain.spiking.gptq import gptq
from sbtrain.spiking.quantize import dequantize, group_scales, output_error, quantize
from sharding import global_state
from tiny_model import MODEL, DictReader, write_export, write_run, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SPIKING = SpikingConfig(enabled=True, weight_group=8)
PAIRS = replace(
    MODEL, pattern="(LS)(LF)", num_layers=2, gla=GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied),
    meta=MetaConfig(num_tokens=3), spiking=replace(SPIKING, spike_down_proj=True, weight_group=4),
)  # fmt: skip
MODELS = {
    "LS": replace(MODEL, num_layers=2, spiking=SPIKING),
    "LF_some_left_out": replace(
        MODEL, pattern="LF", num_layers=2, spiking=replace(SPIKING, skip={"gate": "all", "gate_up": "1"})
    ),
    "pairs": PAIRS,
    "pairs_shared": replace(PAIRS, pair=PairConfig(shared_projections=True), gla=GLAConfig(), meta=MetaConfig()),
}


@pytest.fixture(autouse=True)
def launch_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [
        {"text": f"the quick brown fox number {i * 37} jumps over {i % 7} lazy dogs, again and again. " * 2}
        for i in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_what_calibration_sees_is_what_the_int8_model_computes(tmp_path, text, name):
    """From the exported model, whole: every projection's inputs, their Hessian, and GPTQ of the float weight again."""
    model, arguments = MODELS[name], [f"data={text}", "samples=4", "seq_len=48"]
    run = write_run(tmp_path / "run", model)
    calibrated = Calibrated(calibrate([f"run={run}", *arguments]))
    assert calibrated.folder == run / "calibrated" / "step_5"
    _main("export.py", f"run={run}", f"out={tmp_path / 'int8'}", "format=w8aspike", "dtype=fp32")
    rows = calibration_rows(Calibration(str(text), samples=4, seq_len=48), tokenizers.load(tmp_path / "tokenizer"))
    float_weights = MergedGates(DictReader(global_state(model)), model)
    with Mesh.build(Layout()) as mesh:
        built = load_model(Where(model=str(tmp_path / "int8")), mesh).model
        hessians = _hessians(built, rows, calibrated.names)
        weights = {key: tensor.detach().clone() for key, tensor in global_parameters(built).items()}
    errors = json.loads((calibrated.folder / "calibration.json").read_text())["errors"]
    for key in calibrated.names:
        integers, scales = calibrated.get(key)
        weight, hessian = float_weights.get(key), hessians[key]
        assert torch.equal(weights[key], dequantize(integers, scales))
        again, _ = gptq(weight, hessian, group=calibrated.model.spiking.weight_group)
        assert (again != integers).float().mean() < 0.02  # sums of another order
        nearest = group_scales(weight, calibrated.model.spiking.weight_group)
        nearest = output_error(weight, dequantize(quantize(weight, nearest), nearest), hessian)
        ours = output_error(weight, dequantize(integers, scales), hessian)
        assert errors[key] == {"gptq": pytest.approx(ours, rel=0.02), "rtn": pytest.approx(nearest, rel=0.02)}
        assert ours < nearest, key
    for key in set(weights) - set(calibrated.names):
        rows = model.vocab_size if key.endswith(("word_embeddings.weight", "output_layer.weight")) else None
        assert torch.equal(weights[key][:rows], float_weights.get(key)[:rows])


def _hessians(built, rows, names):
    """x^T x of what each projection reads, from forward passes of the whole model."""
    sums, hooks = {}, []
    for name in names:
        module = built.get_submodule(name.removesuffix(".weight"))

        def see(module, args, name=name):
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.T @ x

        hooks.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        for row in rows:
            tokens, _, documents = shard_row(row, rank=0, size=1)
            built(tokens, documents)
    for hook in hooks:
        hook.remove()
    return sums


def _main(script, *arguments):
    """A script of launch/, in this process."""
    code = runpy.run_path(str(ROOT / "launch" / script))["main"](list(arguments))
    assert code == 0, arguments


def test_the_launch_scripts_one_after_the_other(tmp_path, text, capsys):
    """A model that does not spike yet, a folder in place of a run, rounding to nearest, and the way back."""
    folder = write_export(tmp_path / "folder", replace(MODEL, num_layers=2))
    how = (f"model={folder}", f"data={text}", "samples=2", "seq_len=40", "k=2.5", "weight_group=8", "method=rtn")
    _main("calibrate.py", *how, "spike_down_proj=true")
    printed = capsys.readouterr().out
    assert "model.spiking.enabled is false here; calibrated as a model that spikes, k=2.5" in printed
    assert "layer 2/2  qkv rtn " in printed and "; down rtn " in printed and "gptq" not in printed
    _main("export.py", f"model={folder}", f"out={tmp_path / 'int8'}", "format=w8aspike", "dtype=fp32")
    assert "(format sbtrain, INT8 weights)" in capsys.readouterr().out
    with Mesh.build(Layout()) as mesh:
        loaded = load_model(Where(model=str(tmp_path / "int8")), mesh)
        weight = global_parameters(loaded.model)["decoder.layers.0.mlp.linear_fc2.weight"]
        expected = global_state(MODEL)["decoder.layers.0.mlp.linear_fc2.weight"]
        scales = group_scales(expected, 8)
        assert torch.equal(weight, dequantize(quantize(expected, scales), scales))
    assert loaded.config.spiking == SpikingConfig(enabled=True, k=2.5, weight_group=8, spike_down_proj=True)
    _main("generate.py", f"model={tmp_path / 'int8'}", "prompt=the", "max_new_tokens=3")
    _main("evaluate.py", f"model={tmp_path / 'int8'}", f"data={text}", "lengths=32", "tokens=64")
    assert (tmp_path / "int8" / "evaluation" / "bpb.json").is_file()
    capsys.readouterr()
    assert runpy.run_path(str(ROOT / "launch" / "calibrate.py"))["main"](list(how)) == 2
    assert capsys.readouterr().err == f"error: out={folder}/calibrated exists; remove it or give out= another folder\n"


def test_the_weights_are_the_checkpoints_in_any_precision(tmp_path, text):
    """Layers in bf16 move the samples; what is rounded, and measured against, is fp32."""
    model = replace(MODEL, num_layers=2, spiking=SPIKING)
    run, exact = write_run(tmp_path / "run", model), MergedGates(DictReader(global_state(model)), model)
    how = (f"data={text}", "samples=2", "seq_len=40", "method=rtn", "precision=bf16")
    found = Calibrated(calibrate([f"run={run}", *how]))
    assert found.names
    for name in found.names:
        scales = group_scales(exact.get(name), SPIKING.weight_group)
        assert torch.equal(found.get(name)[0], quantize(exact.get(name), scales)), name
        assert torch.equal(found.get(name)[1], scales)


class Counted(TorchDispatchMode):
    """Bytes of live tensors that operations have made, and the most there were at once."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self._users = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        self.most = max(self.most, self.live)
        return result

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        users, _ = self._users.get(key, (0, 0))
        if not users:
            self.live += size
        self._users[key] = users + 1, size
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key):
        users, size = self._users[key]
        self._users[key] = users - 1, size
        if users == 1:
            self.live -= size


def _most_bytes(num_layers, samples, text, tokenizer, monkeypatch):
    """Most bytes of operations' results, without what a sample needs on the host; of parameters; and a layer's own."""
    model = int8_model(replace(MODEL, num_layers=num_layers), replace(SPIKING, spike_down_proj=True))
    rows = calibration_rows(Calibration(str(text), samples=samples, seq_len=40), tokenizer)
    layers, most_parameters, build_layer = weakref.WeakSet(), [0], layerwise.build_layer

    def counted(*args, **kwargs):
        layer = build_layer(*args, **kwargs)
        layers.add(layer)
        alive = sum(p.numel() * p.itemsize for layer in layers for p in layer.parameters())
        most_parameters[0] = max(most_parameters[0], alive)
        return layer

    monkeypatch.setattr(layerwise, "build_layer", counted)
    with Mesh.build(Layout()) as mesh:
        reader = MergedGates(DictReader(global_state(replace(MODEL, num_layers=num_layers))), MODEL)
        with Counted() as count:
            states = HiddenStates(reader, model, mesh, rows, precision=Precision.fp32)
            for index in range(num_layers):
                calibrate_layer(states, index, method="gptq")
    own = sum(tensor.numel() * 4 for name, tensor in global_state(model).items() if ".layers.0." in name)
    monkeypatch.setattr(layerwise, "build_layer", build_layer)
    hidden, ids = samples * 40 * model.hidden_size * 4, samples * 40 * 8  # and which document a token is of
    return count.most - hidden - ids, most_parameters[0], own


def test_one_layer_is_on_the_device_at_a_time(text, tmp_path, monkeypatch):
    """Counted: parameters of one layer, whatever their number; and as much besides for many samples as for few."""
    tokenizer = tokenizers.load(write_tokenizer(tmp_path / "tokenizer"))
    few, parameters, own = _most_bytes(2, 4, text, tokenizer, monkeypatch)
    assert parameters == own
    more_layers, parameters, _ = _most_bytes(6, 4, text, tokenizer, monkeypatch)
    assert parameters == own and more_layers <= 1.02 * few
    more_samples, parameters, _ = _most_bytes(2, 32, text, tokenizer, monkeypatch)
    assert parameters == own and more_samples <= 1.02 * few


BROKEN = [
    (
        ["samples=4000"],
        r"data=.*text.jsonl has \d+ samples of 64 tokens, 4000 were asked for; give more text, samples=\d+, or a",
    ),
    (["seq_len=100000"], r"has 0 samples of 100000 tokens, 2 were asked for; give more text, or a smaller seq_len="),
    (["method=awq"], "method=awq is not known; choose one of gptq, rtn"),
    (["samples=0"], "samples=0 must be at least 1"),
    (["seq_len=1"], "seq_len=1 must be at least 2"),
    (["k=-1"], "k=-1.0 must be positive and at most"),
    (["k=0"], "k=0.0 must be positive and at most"),
    (["k=inf"], "k=inf must be positive and at most"),
    (["weight_group=0"], "weight_group=0 must be at least 1"),
    (["spike_down_proj=yes"], "spike_down_proj=yes must be true or false"),
    (["weight_group=12"], "weight_group=12 does not divide the 32 input channels of projection qkv"),
    (["smaples=3"], "smaples= is not known here; did you mean samples="),
    (["out={tmp}/there"], "out=.*/there exists; remove it or give out="),
    (["model={tmp}/x"], "one of them"),
    (["step=7"], "step=7: .* does not exist"),
    (["precision=int8"], "precision=int8 is not known"),
    (["out={tmp}/file/x"], "out=.* cannot be written"),
]


@pytest.fixture(scope="module")
def broken_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "run", replace(MODEL, num_layers=2, spiking=SPIKING))
    skip = dict.fromkeys(("qkv", "gate", "proj", "gate_up"), "all")
    write_run(folder / "nothing" / "run", replace(MODEL, num_layers=2, spiking=replace(SPIKING, skip=skip)))
    write_run(folder / "experts" / "run", replace(MODEL, num_layers=2, pattern="L:m", spiking=SPIKING))
    write_run(folder / "nan" / "run", replace(MODEL, num_layers=2, spiking=SPIKING))
    write_run(folder / "no_tokenizer" / "run", replace(MODEL, num_layers=2, spiking=SPIKING))
    shutil.rmtree(folder / "no_tokenizer" / "tokenizer")
    (folder / "there").mkdir()
    (folder / "file").write_text("")
    return folder


@pytest.mark.parametrize("changes, message", BROKEN)
def test_refusals(broken_runs, text, changes, message):
    given = {"run": str(broken_runs / "run"), "data": str(text), "samples": "2", "seq_len": "64"}
    given |= dict(change.format(tmp=broken_runs).split("=", 1) for change in changes)
    _refuses(given, message, broken_runs)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "leaves out every projection"),
        ("experts", "model.pattern: layer 0 is a mixture of experts, which are not calibrated"),
        ("no_tokenizer", "no tokenizer.json"),
    ],
)
def test_runs_that_cannot_be_calibrated(broken_runs, text, name, message):
    _refuses({"run": str(broken_runs / name / "run"), "data": str(text)}, message, broken_runs)


def test_data_that_is_not_there(broken_runs):
    _refuses({"run": str(broken_runs / "run"), "data": "gone"}, "data=gone is neither a text file nor", broken_runs)
    _refuses({"run": str(broken_runs / "run")}, "data= is missing", broken_runs)


def _refuses(given, message, folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=message) as error:
        calibrate([f"{key}={value}" for key, value in given.items()])
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before


def test_weights_that_are_not_finite_leave_nothing_behind(tmp_path, text, monkeypatch):
    model = replace(MODEL, num_layers=2, spiking=SPIKING)
    state = global_state(model)
    state["decoder.layers.1.self_attention.linear_qkv.weight"][3, 3] = float("nan")
    monkeypatch.setattr("tiny_model.global_state", lambda config: state)
    run = write_run(tmp_path / "run", model)
    message = "decoder.layers.1.self_attention.linear_qkv.weight: a weight is not finite"
    with pytest.raises(ValueError, match=message):
        calibrate([f"run={run}", f"data={text}", "samples=2", "seq_len=40"])
    assert not list((run / "calibrated").iterdir())


def refused_on_ranks(rank: int, arguments: list[str]) -> str:
    try:
        return str(calibrate(arguments))
    except ValueError as error:
        return str(error)


def test_one_process_calibrates(broken_runs, text, run_ranks):
    """Two would write the same folder."""
    arguments = [f"run={broken_runs / 'run'}", f"data={text}", "samples=2", "seq_len=40"]
    said = "calibration runs in one process, this is one of 2; start it without torchrun"
    assert run_ranks(2)(refused_on_ranks, arguments) == [said] * 2
    assert not (broken_runs / "run" / "calibrated").exists()


def test_exports_without_calibration(broken_runs, capsys):
    main = runpy.run_path(str(ROOT / "launch" / "export.py"))["main"]
    run = broken_runs / "run"
    for arguments, message in {
        (f"run={run}", "format=w8aspike"): f"make them with: python launch/calibrate.py run={run} data=PREFIX",
        ("model=x", "format=hf"): "model= goes with format=w8aspike alone",
        (f"run={run}", "calibrated=x"): "calibrated= goes with format=w8aspike alone",
        (f"run={run}", "model=x"): "run= and step= do not go with model=",
    }.items():
        assert main([*arguments, f"out={broken_runs / 'out'}"]) == 2
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1
    assert not (broken_runs / "out").exists()
