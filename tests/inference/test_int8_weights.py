"""int8=true: models on the integers of their calibration compute what float weights and replaced activations do.

In fp64 both have the same integers, scales and thresholds, so only the order of sums differs: logits agree to 1e-9. In
fp32 the same holds for each projection (a few roundings of 2^-24 in sums of at most 64 terms: 1e-5 of the norm), but
sums rounded otherwise may flip a count further on: then a token, and those that see it, differ by a spike.
"""

from __future__ import annotations

import gc
import json
import runpy
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ops
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MetaConfig, PairConfig
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.convert.calibrated import Calibrated
from sbtrain.convert.names import projection_of
from sbtrain.inference.calibrate import calibrate
from sbtrain.inference.generate import advance, generate_ids, prefill
from sbtrain.inference.int8 import swap
from sbtrain.inference.load import Where, load_model
from sbtrain.model.build import global_buffers, global_parameters
from sbtrain.model.cache import Cache
from sbtrain.spiking.linear import Int8Projection
from sbtrain.spiking.neuron import neurons
from tiny_model import MODEL, parallel_logits, write_export, write_run

ROOT = Path(__file__).resolve().parents[2]
SPIKING = SpikingConfig(enabled=True, weight_group=32)
SMALL = replace(MODEL, num_layers=2, ffn_size=64, spiking=SPIKING)
DOWN = replace(SPIKING, spike_down_proj=True)
TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
MODELS = {
    "LS": replace(SMALL, spiking=replace(DOWN, k=2.5, layer_k={1: 4.0})),
    "LF_some_left_out": replace(SMALL, pattern="LF", spiking=replace(SPIKING, skip={"gate": "all", "gate_up": "1"})),
    "gate_alone": replace(SMALL, pattern="L", spiking=replace(SPIKING, skip={"qkv": "all", "proj": "0", "gate": "1"})),
    "pairs": replace(SMALL, pattern="(LS)(LF)", gla=TIED, meta=MetaConfig(num_tokens=3), spiking=DOWN),
    "pairs_shared": replace(SMALL, pattern="(LS)L", pair=PairConfig(shared_projections=True)),
    "released": replace(
        SMALL, hidden_size=128, num_heads=8, head_dim=16, ffn_size=128, spiking=SpikingConfig(enabled=True)
    ),
}  # fmt: skip
TOTAL, PIECES = 40, [23, 1, 1, 9, 1, 1, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"fox number {i * 37} jumps over {i % 7} dogs. "}) for i in range(20))
    )
    return path


def main(script, *arguments) -> int:
    """A script of launch/, in this process."""
    if str(ROOT / "launch") not in sys.path:
        sys.path.insert(0, str(ROOT / "launch"))
    return runpy.run_path(str(ROOT / "launch" / script))["main"](list(map(str, arguments)))


def calibrated_run(folder, text, model, *arguments):
    run = write_run(folder / "run", model)
    how = ["samples=2", "seq_len=32", *arguments]
    return run, Calibrated(calibrate([f"run={run}", f"data={text}", *how]))


def exported(run):
    out = run.parent / "w8aspike"
    assert main("export.py", f"run={run}", f"out={out}", "format=w8aspike", "dtype=bf16") == 0
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory, text):
    """Name -> (run, its calibration, its W8ASpike folder) of every model."""
    found = {}
    for name, model in MODELS.items():
        run, calibrated = calibrated_run(tmp_path_factory.mktemp(name), text, model)
        found[name] = run, calibrated, exported(run)
    return found


@pytest.fixture
def mesh(made):
    with Mesh.build(Layout()) as mesh:
        yield mesh


def swapped(model) -> dict[str, Int8Projection]:
    found = model.named_modules()
    return {name + ".weight": module for name, module in found if isinstance(module, Int8Projection)}


@pytest.mark.parametrize("name", MODELS)
def test_the_integers_are_those_of_the_calibration(made, mesh, name):
    """From the run's calibration and from the W8ASpike folder, whose weights are bf16: the same integers and scales.
    Of a weight that is swapped no floats stay."""
    run, calibrated, folder = made[name]
    plain = load_model(Where(model=str(folder)), mesh).model
    for where in (Where(run=str(run), int8=True), Where(model=str(folder), int8=True)):
        loaded = load_model(where, mesh)
        projections = swapped(loaded.model)
        assert set(projections) == set(calibrated.names)
        for key, projection in projections.items():
            integers, scales = calibrated.get(key)
            assert torch.equal(projection.weight, integers) and torch.equal(projection.weight_scale, scales)
            assert projection.weight.dtype == torch.int8
        floats, buffers = global_parameters(loaded.model), global_buffers(loaded.model)
        assert set(floats) == set(global_parameters(plain)) - set(calibrated.names)
        for key, parameter in floats.items() if where.model else ():
            assert torch.equal(parameter, global_parameters(plain)[key]), key
        gone = {key.removesuffix(".weight") for key in calibrated.names}
        assert set(buffers) - set(global_buffers(plain)) == {
            f"{key}.{leaf}" for key in gone for leaf in ("weight", "weight_scale")
        }
        assert not {(neuron.site, neuron.layer) for neuron in neurons(loaded.model)} & set(
            map(projection_of, calibrated.names)
        )


def exact(model):
    """The model in float64, but for scales, which are fp32 numbers in both paths."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_all_at_once_and_token_by_token(made, mesh, name):
    folder = made[name][2]
    tokens = torch.randint(MODEL.vocab_size, (TOTAL,), generator=torch.Generator().manual_seed(0))
    floats, int8 = (load_model(Where(model=str(folder), int8=on), mesh).model for on in (False, True))
    assert_equal_but_for_flips(parallel_logits(int8, tokens), parallel_logits(floats, tokens))
    assert_equal_but_for_flips(stepped(int8, tokens), stepped(floats, tokens))
    expected = parallel_logits(exact(floats), tokens)
    torch.testing.assert_close(parallel_logits(exact(int8), tokens), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(stepped(int8, tokens), expected, atol=1e-8, rtol=0)


def stepped(model, tokens):
    """Logits after every token, read in pieces and one by one."""
    cache = Cache()
    return torch.cat([advance(model, piece, cache, num_logits=None) for piece in tokens.split(PIECES)])


def assert_equal_but_for_flips(logits, expected):
    distance = (logits.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert distance.median() < 1e-5 and distance.max() < 0.3, distance


def test_greedy_tokens_and_every_projection(made, mesh):
    """The same tokens; and what each projection puts out for the same input, in fp32 and bf16."""
    folder = made["LS"][2]
    floats, int8 = (load_model(Where(model=str(folder), int8=on), mesh).model for on in (False, True))
    prompt, how = list(range(60, 90)), dict(max_new_tokens=12, chunk_tokens=16)
    assert list(generate_ids(int8, prompt, **how)) == list(generate_ids(floats, prompt, **how))
    weights = global_parameters(floats)
    for key, projection in swapped(int8).items():
        x = torch.randn(9, 1, projection.weight.shape[1], generator=torch.Generator().manual_seed(1))
        for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            seen = ops.spike_values(x.to(dtype), k=projection.k).double()
            expected = seen @ weights[key].double().T + (0 if projection.bias is None else projection.bias)
            y, _ = projection(x.to(dtype))
            assert y.dtype == dtype and (y - expected).norm() < most * expected.norm(), key


def test_float_weights_are_gone_where_they_are_swapped(made, mesh):
    """Nothing refers to them any more, and INT8 weights with scales are 1 / 4 + 1 / 32 of fp32's bytes."""
    calibrated, folder = made["pairs"][1:]
    model = load_model(Where(model=str(folder)), mesh).model
    old = {name: weakref.ref(global_parameters(model)[name]) for name in calibrated.names}
    num_bytes = sum(parameter().nbytes for parameter in old.values())
    projections = swap(model, calibrated.names)
    gc.collect()
    assert [name for name, parameter in old.items() if parameter() is not None] == []
    tensors = [tensor for projection in projections.values() for tensor in projection.buffers()]
    assert sum(tensor.nbytes for tensor in tensors) == num_bytes * (1 / 4 + 1 / 32)


def read_over_ranks(rank: int, folder: str, prompt: list[int]):
    """Logits after the prompt, of floats and of INT8 weights."""
    with Mesh.build(Layout(sp=2)) as mesh:
        models = (load_model(Where(model=folder, int8=on), mesh).model for on in (False, True))
        return [prefill(model, torch.tensor(prompt))[0] for model in models]


def test_prompts_over_ranks(made, run_ranks):
    for floats, int8 in run_ranks(2)(read_over_ranks, str(made["pairs"][2]), list(range(40, 71))):
        assert (int8 - floats).norm() < 0.3 * floats.norm()


def test_the_command_line(tmp_path, text, capsys):
    run, _ = calibrated_run(tmp_path, text, SMALL, f"out={tmp_path / 'there'}")
    given = (f"run={run}", "int8=true", f"calibrated={tmp_path / 'there'}")
    assert main("generate.py", *given, "prompt=the", "max_new_tokens=3") == 0
    assert main("evaluate.py", *given, f"data={text}", "lengths=32", "tokens=64", f"out={tmp_path / 'out'}") == 0
    assert json.loads((tmp_path / "out" / "bpb.json").read_text())["int8"] is True
    capsys.readouterr()
    for script, arguments, words in (
        (
            "generate.py",
            (f"run={run}", "int8=true", "prompt=x"),
            f"make them with: python launch/calibrate.py run={run} ",
        ),
        (
            "generate.py",
            (f"run={run}", "calibrated=x", "prompt=x"),
            "calibrated= says where int8=true finds its weights",
        ),
        ("generate.py", (f"run={run}", "int8=1", "prompt=x"), "int8=1 must be true or false"),
        (
            "evaluate.py",
            (*given, "suite=spiking", f"data={text}"),
            "int8=true: suite spiking measures with and without",
        ),
        ("evaluate.py", (*given, "suite=lm_eval", "tasks=x"), "int8=true: suite lm_eval runs the model through"),
        ("calibrate.py", (f"run={run}", "int8=true", f"data={text}"), "int8=true: calibration makes the INT8 weights"),
    ):
        assert main(script, *arguments) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1


def test_the_released_model_says_nothing_of_its_spikes(tmp_path, made, mesh):
    """Its config.json has no key for them: the names of its tensors tell."""
    _, calibrated, folder = made["released"]
    released = shutil.copytree(folder, tmp_path / "released")
    config = json.loads((released / "config.json").read_text())
    assert config["model_type"] == "gla_swa"
    del config["spiking"], config["gate_full_rank"]
    (released / "config.json").write_text(json.dumps(config))
    model = load_model(Where(model=str(released), int8=True), mesh).model
    assert set(swapped(model)) == set(calibrated.names)
    tokens = torch.arange(40)
    expected = parallel_logits(load_model(Where(model=str(folder), int8=True), mesh).model, tokens)
    assert torch.equal(parallel_logits(model, tokens), expected)


def test_a_folder_without_spikes_and_its_own_calibration(tmp_path, text):
    """Everything by launch scripts; neither folder nor key says that the model spikes, its calibration does."""
    folder = write_export(tmp_path / "folder", replace(SMALL, spiking=SpikingConfig()))
    how = (f"data={text}", "samples=2", "seq_len=32", "weight_group=32", "k=2.5", "method=rtn")
    assert main("calibrate.py", f"model={folder}", *how) == 0
    assert main("generate.py", f"model={folder}", "int8=true", "prompt=the", "max_new_tokens=2") == 0
    with Mesh.build(Layout()) as mesh:
        loaded = load_model(Where(model=str(folder), int8=True), mesh)
    assert loaded.config.spiking.enabled and {each.k for each in swapped(loaded.model).values()} == {2.5}


def test_what_cannot_be_multiplied(tmp_path, made, text):
    """Groups that integers are not multiplied by; weights of another checkpoint; a folder that has INT8 weights."""
    run, _ = calibrated_run(tmp_path, text, replace(SMALL, spiking=replace(SPIKING, weight_group=8)))
    other = write_export(tmp_path / "other" / "export", replace(SMALL, window=9))
    _, calibrated, folder = made["LS"]
    with Mesh.build(Layout()) as mesh:
        for where, words in (
            (Where(run=str(run)), "groups of 8 channels, integers are multiplied by groups of a multiple of 32"),
            (Where(model=str(other), calibrated=str(calibrated.folder)), "was calibrated of another model than this"),
            (Where(model=str(folder), calibrated=str(calibrated.folder)), "has INT8 weights itself; drop it"),
        ):
            with pytest.raises(ValueError, match=words):
                load_model(replace(where, int8=True), mesh)
