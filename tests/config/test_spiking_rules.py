"""model.spiking: how its tables are written, and what is refused in one line with the key and the fix."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sbtrain.bench.shapes import TINY
from sbtrain.config.export_shape import contradiction
from sbtrain.config.load import load, save
from sbtrain.config.model_schema import Gate, GLAConfig
from sbtrain.config.spiking_rules import check_spiking
from sbtrain.config.spiking_schema import SpikingConfig

DRY = ["recipe=7b_cpt", "dry_run=true"]
MODEL = replace(TINY, num_layers=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 0.0}, "model.spiking.k=0.0 must be greater than 0"),
        ({"k": -3.0}, "model.spiking.k=-3.0 must be greater than 0"),
        ({"layer_k": {1: 0.0}}, "model.spiking.layer_k.1=0.0 must be greater than 0"),
        (
            {"layer_k": {4: 2.0}},
            "model.spiking.layer_k.4: the model's layers are 0 to 3; remove it or name one of them",
        ),
        ({"warm_in_tokens": -1}, "model.spiking.warm_in_tokens=-1 is negative; give 0 or more"),
        ({"weight_group": 0}, "model.spiking.weight_group=0 must be 1 or more"),
        ({"skip": {"gate_upp": "all"}}, "model.spiking.skip.gate_upp is no projection; did you mean gate_up?"),
        ({"skip": {"lm_head": "all"}}, "skip.lm_head is no projection; there are: qkv, gate, proj, gate_up, down"),
        ({"skip": {"qkv": "0-4"}}, "model.spiking.skip.qkv='0-4' names layer 4, the model's layers are 0 to 3"),
        ({"skip": {"qkv": "3-1"}}, "model.spiking.skip.qkv: 3-1 runs backward; write the smaller layer first"),
        ({"skip": {"qkv": "1,"}}, "model.spiking.skip.qkv: '' is no layer and no range of layers"),
        ({"skip": {"qkv": ""}}, "write for example '0-3,27' or 'all'"),
        ({"skip": {"qkv": "-1"}}, "model.spiking.skip.qkv: '-1' is no layer"),
        ({"skip": {"qkv": "first"}}, "model.spiking.skip.qkv: 'first' is no layer"),
    ],
)
def test_tables_that_make_no_sense(changes, words):
    """Whether spikes are on or not: they may be turned on by one key."""
    for enabled in (True, False):
        with pytest.raises(ValueError) as caught:
            check_spiking(replace(MODEL, spiking=SpikingConfig(enabled=enabled, **changes)))
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({}, "1,3", "model.spiking.skip.gate='1,3' leaves out no gate: layers 0, 2 have one; name some of them, or re"),
        ({"pattern": "FS"}, "all", "model.spiking.skip.gate='all' leaves out no gate: no layer of this model has one"),
        ({"gla": GLAConfig(gate=Gate.tied)}, "0", "skip.gate='0' leaves out no gate: no layer of this model has one"),
    ],
)
def test_gates_that_are_not_there(changes, where, words):
    model = replace(MODEL, **{"pattern": "LS", **changes})
    with pytest.raises(ValueError) as caught:
        check_spiking(replace(model, spiking=SpikingConfig(skip={"gate": where})))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    check_spiking(replace(MODEL, pattern="LS", spiking=SpikingConfig(skip={"gate": "0-1"})))


def test_what_spikes():
    spiking = SpikingConfig(enabled=True, layer_k={2: 1.5}, skip={"qkv": "0-1, 3", "proj": "all"})
    check_spiking(replace(MODEL, spiking=spiking))
    assert [spiking.spikes("qkv", layer) for layer in range(4)] == [False, False, True, False]
    assert not any(spiking.spikes("proj", layer) or spiking.spikes("down", layer) for layer in range(4))
    assert replace(spiking, spike_down_proj=True).spikes("down", 0) and spiking.spikes("gate_up", 3)
    assert not replace(spiking, enabled=False).spikes("gate_up", 3)
    assert [spiking.k_of(layer) for layer in range(3)] == [3.0, 3.0, 1.5]


def test_the_share_rises_with_the_tokens():
    spiking = SpikingConfig(enabled=True, warm_in_tokens=200)
    assert [spiking.share_after(tokens) for tokens in (0, 50, 200, 999)] == [0.0, 0.25, 1.0, 1.0]
    assert SpikingConfig().share_after(0) == 1.0


def test_tables_on_the_command_line_and_in_a_file(tmp_path):
    given = ("model.spiking.enabled=true", "model.spiking.layer_k.3=2.5", 'model.spiking.skip.down="0-3,27"')
    recipe = load([*DRY, *given])
    assert recipe.model.spiking.layer_k == {3: 2.5} and recipe.model.spiking.skip == {"down": "0-3,27"}
    save(recipe, tmp_path / "recipe.yaml")
    assert load([f"recipe={tmp_path / 'recipe.yaml'}", "dry_run=true"]) == recipe
    whole = load([*DRY, "model.spiking.enabled=true", "model.spiking.layer_k={3:2.5,0:4}"])
    assert whole.model.spiking.layer_k == {3: 2.5, 0: 4.0}
    (tmp_path / "mine.yaml").write_text(
        "defaults: [7b_cpt, _self_]\ndry_run: true\nmodel: {spiking: {enabled: true, layer_k: {3: 2.5}}}\n"
    )
    assert load([f"recipe={tmp_path / 'mine.yaml'}"]).model.spiking.layer_k == {3: 2.5}
    both = load([f"recipe={tmp_path / 'mine.yaml'}", "model.spiking.layer_k.3=2.0"])
    assert both.model.spiking.layer_k == {3: 2.0}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.spiking.layer_k.first=2.5", "model.spiking.layer_k: 'first' is not a number"),
        ("model.spiking.layer_k.28=2.5", "model.spiking.layer_k.28: the model's layers are 0 to 27"),
        ("model.spiking.k=0", "model.spiking.k=0.0 must be greater than 0"),
        ("model.spiking.skip.down=3", "model.spiking.skip.down=3 is not text; quote it"),
        ("model.spiking.skip.down=0-3,27", "needs quotes around its value"),
        ("model.spiking.kk=3", "model.spiking.kk is not a key of the recipe; did you mean model.spiking.k?"),
    ],
)
def test_mistakes_on_the_command_line(override, words):
    with pytest.raises(ValueError) as caught:
        load([*DRY, override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_any_export_may_be_trained_with_spikes():
    spiking = replace(MODEL, spiking=SpikingConfig(enabled=True))
    assert contradiction(spiking, MODEL) is None and contradiction(spiking, spiking) is None
    assert contradiction(replace(MODEL, spiking=SpikingConfig(enabled=True, k=2.0)), spiking) is None
    assert contradiction(MODEL, spiking) == "model.spiking.enabled=false contradicts true"
