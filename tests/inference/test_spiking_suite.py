"""Suite spiking on small models: figures against brute force, its files, the run's page, and refusals."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ops
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.sequence.shard import Documents
from sbtrain.config.model_schema import Gate, GLAConfig, MetaConfig, MoEConfig
from sbtrain.config.schema import Precision
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.inference import bits, spiking
from sbtrain.inference.load import Loaded, Where, load_model
from sbtrain.inference.spiking_tables import table
from sbtrain.spiking.neuron import neurons
from tiny_model import EOS, MODEL, build, loaded_model, write_export, write_run

ROOT = Path(__file__).resolve().parents[2]
SPIKING = SpikingConfig(enabled=True)
ALL_SPIKING = replace(SPIKING, spike_down_proj=True)
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TEXTS = [ALPHABET[start:] + ALPHABET[:start] for start in range(0, 26, 3)]


@pytest.fixture
def mesh():
    with Mesh.build(Layout()) as mesh:
        yield mesh


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def options_of(texts: Path, **changes) -> spiking.SpikingOptions:
    return spiking.SpikingOptions(**{"lengths": (32,), "tokens": 128, "data": (str(texts),), **changes})


def train(loaded: Loaded, *, num_steps: int) -> None:
    """Teach it the alphabet."""
    ids = torch.tensor([token for text in TEXTS for token in (*loaded.tokenizer.encode_batch([text])[0], EOS)])
    bounds = torch.arange(0, len(ids) + 1, 27, dtype=torch.int32)
    documents = Documents(bounds, torch.arange(27).repeat(len(TEXTS)))
    labels = torch.where(ids == EOS, EOS, ids.roll(-1))
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loaded.model(ids, documents, labels).mean().backward()
        optimizer.step()


def test_figures_are_those_of_all_counts(mesh, tmp_path, texts):
    loaded = loaded_model(tmp_path / "tokenizer", mesh, spiking=replace(SPIKING, spike_down_proj=True, k=2.0))
    report = spiking.run(loaded, options_of(texts, k=(2.0, 5.0)))
    seen = {}
    for neuron in neurons(loaded.model):
        assert neuron.k == 2.0 and neuron.share == 1.0 and neuron.observer is None, "left as it was"
        neuron.observer = lambda neuron, x, *_: seen.setdefault((neuron.layer, neuron.site), []).append(x)
    plain = bits.run(loaded, bits.BitsOptions(lengths=(32,), tokens=128, data=(str(texts),)))
    point = report["sweep"][0]
    assert point["results"] == plain["results"] and report["shown"] == 0
    inputs = {f"{layer}.{site}": torch.cat([x.reshape(-1, x.shape[-1]) for x in parts])
              for (layer, site), parts in seen.items()}  # fmt: skip
    assert set(point["sites"]) == set(inputs) and set(point["layers"]) == {"0", "1", "2", "3"}
    assert set(point["projections"]) == {"qkv", "proj", "gate_up", "down", "queries"}
    total_spikes = total_values = 0
    for name, x in inputs.items():
        magnitude = ops.spike_count(x, k=2.0)[0].abs().flatten().tolist()
        windows = [(value >> 3 * i) & 7 for value in magnitude for i in range(3)]
        figures = point["sites"][name]
        assert figures["silent_windows"] == pytest.approx(windows.count(0) / len(windows)), name
        assert figures["zero_counts"] == pytest.approx(magnitude.count(0) / len(magnitude))
        num_spikes = sum(value.bit_count() for value in magnitude)
        assert figures["mean_spikes"] == pytest.approx(num_spikes / len(magnitude))
        total_spikes, total_values = total_spikes + num_spikes, total_values + len(magnitude)
    assert point["total"]["mean_spikes"] == pytest.approx(total_spikes / total_values)
    assert point["total"]["energy"]["pj"] == pytest.approx(0.03 * total_spikes / total_values)


def test_sparsity_falls_and_accuracy_rises_with_k(mesh, tmp_path, texts):
    """So small a model's losses at k = 2 and 4 may be in either order, as a processor rounds."""
    loaded = loaded_model(tmp_path / "tokenizer", mesh)
    train(loaded, num_steps=60)
    state = loaded.model.state_dict()
    plain = bits.run(loaded, bits.BitsOptions(lengths=(32,), tokens=128, data=(str(texts),)))
    spiked = loaded_model(tmp_path / "tokenizer", mesh, spiking=SPIKING)
    spiked.model.load_state_dict(state)
    report = spiking.run(spiked, options_of(texts, k=(0.5, 1.0, 2.0, 4.0, 1000.0)))
    assert report["off"]["results"] == plain["results"] and report["off"]["mean"] < 1.5, "it has learned"
    del report["sweep"][report["shown"]]  # its own k, 3, which nobody asked for
    costs = [point["cost"] for point in report["sweep"]]
    assert costs[0] > costs[1] > max(costs[2:]) and costs[0] > 1 and abs(costs[4]) < 0.05
    sparsities = [point["total"]["silent_windows"] for point in report["sweep"]]
    assert sparsities == sorted(sparsities, reverse=True)
    assert 0.5 < sparsities[2] < 0.8, "near the report's"


def test_only_text_is_counted(mesh, tmp_path, texts):
    """Neither what fills up a row nor meta tokens, in experts neither: counts as a row of the text alone gives them."""
    meta = MetaConfig(num_tokens=20)
    moe = MoEConfig(num_experts=3, top_k=2, num_shared_experts=1)
    config = replace(MODEL, num_layers=2, pattern="(LS)(LF):m", meta=meta, moe=moe, gla=GLAConfig(gate=Gate.tied))
    loaded = loaded_model(tmp_path / "tokenizer", mesh, **vars(replace(config, spiking=ALL_SPIKING)))
    num_tokens = 27 * len(TEXTS)
    reports = [spiking.run(loaded, options_of(texts, k=(3.0,), lengths=(size,), tokens=10**4)) for size in
               (num_tokens, 4 * num_tokens)]  # fmt: skip
    (exact,), (filled,) = (report["sweep"] for report in reports)
    assert exact["sites"] == filled["sites"] and reports[0]["rasters"] == reports[1]["rasters"]
    channels = {"qkv": 1, "proj": 2, "gate_up": 1}
    for site, times in channels.items():
        assert exact["sites"][f"0.{site}"]["num_values"] == times * num_tokens * config.hidden_size, site
    assert exact["sites"]["0.down"]["num_values"] == num_tokens * config.ffn_size
    assert exact["sites"]["1.down"]["num_values"] == num_tokens * config.ffn_size * (moe.top_k + 1)
    seen = []
    qkv = next(neuron for neuron in neurons(loaded.model) if (neuron.layer, neuron.site) == (0, "qkv"))
    qkv.observer = lambda neuron, x, *_: seen.append(ops.spike_count(x, k=3.0)[0])
    bits.run(loaded, bits.BitsOptions(lengths=(num_tokens,), data=(str(texts),)))
    assert reports[0]["rasters"][0]["counts"] == seen[0][20:36, 0].tolist()


def test_a_k_for_each_layer_is_measured_as_it_is(mesh, tmp_path, texts):
    own = replace(SPIKING, layer_k={0: 0.5, 1: 50.0})
    loaded = loaded_model(tmp_path / "tokenizer", mesh, spiking=own)
    report = spiking.run(loaded, options_of(texts, k=(3.0,)))
    first, second = report["sweep"]
    plain = bits.run(loaded, bits.BitsOptions(lengths=(32,), tokens=128, data=(str(texts),)))
    assert first["results"] == plain["results"] != second["results"] and report["shown"] == 0
    assert (first["k"], first["layer_k"], second["layer_k"]) == (3.0, {0: 0.5, 1: 50.0}, {})
    assert first["layers"]["0"]["silent_windows"] > 0.8 > 0.6 > first["layers"]["1"]["silent_windows"]
    assert "k by layer" in table(report)


def launch(arguments: list[str]) -> int:
    return runpy.run_path(str(ROOT / "launch" / "evaluate.py"))["main"](arguments)


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """A folder of a model that was trained without spikes."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.chdir(tmp_path)
    return str(write_export(Path("folder"), MODEL))


def test_a_model_without_spikes_gets_neurons(mesh, exported):
    loaded = spiking.load(Where(model=exported), spiking.SpikingOptions(), mesh)
    sites = {"qkv", "proj", "gate_up", "queries"}
    assert {neuron.site for neuron in neurons(loaded.model)} == sites
    more = spiking.load(Where(model=exported), spiking.SpikingOptions(spike_down_proj=True), mesh)
    assert {neuron.site for neuron in neurons(more.model)} == sites | {"down"}
    assert not neurons(load_model(Where(model=exported), mesh).model)
    plain = build(MODEL, mesh, precision=Precision.fp32)
    assert loaded.model.state_dict().keys() == plain.state_dict().keys()


def test_launch_evaluate_leaves_tables_and_plots(exported, texts, capsys):
    arguments = [f"model={exported}", "suite=bpb,spiking", f"data={texts}", "lengths=32", "tokens=64", "k=2,3"]
    assert launch(arguments) == 0
    printed = capsys.readouterr().out
    folder = Path(exported) / "evaluation"
    names = ["bpb.json", "spiking.json", *(f"spiking_{name}.png" for name in ("cost", "counts", "raster", "windows"))]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all((folder / name).read_bytes()[1:4] == b"PNG" for name in names[2:])
    report = json.loads((folder / "spiking.json").read_text())
    assert report["model"] == exported and report["k"] == [2.0, 3.0] and report["shown"] == 1
    assert report["off"]["results"] == json.loads((folder / "bpb.json").read_text())["results"]
    assert table(report) in printed
    first, *others = (block.splitlines() for block in table(report).split("\n\n"))
    assert [line.split("  ")[0] for line in first] == ["bits per byte", "no spikes", "k = 2", "k = 3"]
    assert [line.split()[0] for line in others[0][1:]] == ["qkv", "queries", "proj", "gate_up", "all"]
    assert len(others[1]) == 5 and f"{report['sweep'][1]['cost']:+.2%}" in first[3]
    for raster in report["rasters"]:
        assert raster["site"] == "qkv" and math.prod(torch.tensor(raster["counts"]).shape) == 16 * MODEL.hidden_size


def test_the_page_of_a_run_shows_its_spikes(exported, texts, tmp_path, capsys):
    """Written when the run ended, built again when the suite has been run."""
    run = write_run(tmp_path / "run", replace(MODEL, spiking=SpikingConfig(k=4.0)))
    (run / "report").mkdir()
    assert launch([f"run={run}", "suite=spiking", f"data={texts}", "lengths=32", "tokens=64", "k=3,4.5"]) == 0
    page = (run / "report" / "index.html").read_text()
    assert f"report: {run}/report/index.html" in capsys.readouterr().out
    assert "<h2>Spikes</h2>" in page and "Measured on step_5." in page and "k = 4.5" in page
    report = json.loads((run / "evaluation" / "spiking.json").read_text())
    assert [point["k"] for point in report["sweep"]] == [3.0, 4.0, 4.5] and report["shown"] == 1, "the recipe's 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["k=0"], "k= must name positive numbers"),
        (["k=1e39"], "k= must name positive numbers up to 1e+09"),
        (["k=nan"], "k= must name positive numbers"),
        (["k="], "k= must name positive numbers"),
        (["k=3,3.0"], "k= names a number twice"),
        (["k=three"], "k=three is not a number"),
        (["ks=3"], "did you mean k=?"),
        (["data=none"], "data=none is neither a text file nor a prefix"),
        (["lengths=1"], "lengths= must name contexts of at least 2 tokens"),
    ],
)
def test_mistakes_are_one_line(exported, texts, arguments, message, capsys):
    given = [*([] if arguments[0].startswith("data") else [f"data={texts}"]), *arguments]
    assert launch([f"model={exported}", "suite=spiking", *given]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error:") and errors.count("\n") == 1 and message in errors
    assert not Path(exported, "evaluation").exists()


def test_text_is_asked_for(exported, capsys):
    assert launch([f"model={exported}", "suite=spiking"]) == 2
    assert "there is no text" in capsys.readouterr().err


def test_a_model_that_skips_all_is_said(mesh, tmp_path, texts):
    nothing = dict.fromkeys(("qkv", "gate", "proj", "gate_up", "down"), "all")
    config = replace(SPIKING, skip=nothing, queries=False)
    with pytest.raises(ValueError, match="suite spiking finds no neurons"):
        spiking.run(loaded_model(tmp_path / "tokenizer", mesh, spiking=config), options_of(texts))
