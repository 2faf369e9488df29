"""Runs that warm in to spikes resume bitwise anywhere on the way, and are judged as they were trained."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.place import section
from run_case import curve, run_until, tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit, check_owner, identity
from sbtrain.inference import spiking
from sbtrain.inference.load import Where, load_model
from sbtrain.spiking.neuron import neurons
from sbtrain.train.evaluate import HeldOut

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SPIKING = (
    "model.spiking.enabled=true",
    "model.spiking.spike_down_proj=true",
    "model.spiking.layer_k.1=2.5",
    "model.spiking.warm_in_tokens=640",
    "~stages.ctx_128",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_ranks):
    """The uninterrupted run on two ranks: 6 steps data-parallel, 4 in a pipeline, 128 tokens each."""
    root = tmp_path_factory.mktemp("spiking")
    write_inputs(root)
    assert run_ranks(2)(run_until, tiny_recipe(root, "whole", *SPIKING, "checkpoint.keep_last=0")) == [Exit.DONE] * 2
    return root, curve(root / "whole")


def test_the_share_follows_the_tokens_and_sparsity_is_recorded(whole):
    root, _ = whole
    records = [json.loads(line) for line in (root / "whole/metrics.jsonl").read_text().splitlines()]
    assert [record["spike_share"] for record in records] == [min(1.0, step * 128 / 640) for step in range(10)]
    assert all(0.4 < record["spike_sparsity"] < 0.95 for record in records)


@pytest.mark.parametrize("stop", [2, 7])
def test_resume_is_bitwise(whole, run_ranks, stop):
    root, records = whole
    recipe = tiny_recipe(root, f"stop_{stop}", *SPIKING)
    assert run_ranks(2)(run_until, recipe, stop) == [Exit.REQUEUE] * 2
    assert run_ranks(2)(run_until, recipe) == [Exit.DONE] * 2
    assert curve(root / f"stop_{stop}") == records
    points = [json.loads((root / name / "evaluation.json").read_text()) for name in ("whole", f"stop_{stop}")]
    assert points[0] == points[1]


def test_a_checkpoint_on_the_way_in_is_what_was_trained(whole, capsys):
    """Loaded by itself it gives the bits per byte that it would have had in the run."""
    root, _ = whole
    with Mesh.build(Layout()) as mesh, section("test"):
        loaded = load_model(Where(run=str(root / "whole"), step="3"), mesh)
        assert "step_3: 60.0% of model.spiking.warm_in_tokens are done" in capsys.readouterr().out
        assert {neuron.share for neuron in neurons(loaded.model)} == {384 / 640}
        suite = spiking.load(Where(run=str(root / "whole"), step="3"), spiking.SpikingOptions(), mesh)
        assert capsys.readouterr().out == "" and {neuron.share for neuron in neurons(suite.model)} == {1.0}
        done = load_model(Where(run=str(root / "whole")), mesh)
        assert capsys.readouterr().out == "" and {neuron.share for neuron in neurons(done.model)} == {1.0}
        found = HeldOut(done.recipe).bits_per_byte(done.model, mesh, must_stop=lambda: False)
    points = json.loads((root / "whole/evaluation.json").read_text())["points"]
    assert [point["name"] for point in points] == ["start", "ctx_32", "ctx_64"]
    for source, judged in points[-1]["sources"].items():
        assert math.isclose(found[source]["bits_per_byte"], judged["bits_per_byte"], rel_tol=1e-4)


def test_spikes_belong_to_the_run(whole):
    root, _ = whole
    check_owner(tiny_recipe(root, "whole", *SPIKING, "model.spiking.weight_group=8"))
    for other in ("model.spiking.k=2.0", "+model.spiking.layer_k.2=1.5", "model.spiking.enabled=false"):
        overrides = [given for given in SPIKING if given.split("=")[0] != other.split("=")[0]]
        with pytest.raises(ValueError, match="belongs to another recipe: model.spiking"):
            check_owner(tiny_recipe(root, "whole", *overrides, other))


def test_what_has_no_effect_does_not_belong_to_the_run(whole):
    root, _ = whole
    plain = identity(tiny_recipe(root, "other"))
    assert identity(tiny_recipe(root, "other", "model.spiking.k=2.0", "model.spiking.warm_in_tokens=9")) == plain
    assert [key for key in plain if key.startswith("model.spiking")] == ["model.spiking.enabled"]


def test_an_export_of_a_checkpoint_on_the_way_in_says_so(whole, capsys, monkeypatch):
    root, _ = whole
    monkeypatch.syspath_prepend(LAUNCH)
    main = runpy.run_path(str(LAUNCH / "export.py"))["main"]
    for step, share in (("3", "60.0%"), ("10", None)):
        assert main([f"run={root / 'whole'}", f"out={root / step}", f"step={step}"]) == 0
        said = capsys.readouterr().out
        assert (f"step_{step} was trained with {share} of activations replaced" in said) == bool(share)
        assert ("warm_in_tokens" in said) == bool(share)
