"""Recipes and overrides: what loads, and the one line that every mistake gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sbtrain.config import load as door
from sbtrain.config.load import load, recipe_names, save, to_yaml
from sbtrain.config.schema import Decay, Precision, Recompute

DRY = ["recipe=7b_cpt", "dry_run=true"]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder that looks like a tiny Llama checkpoint."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


def message(args: list[str]) -> str:
    with pytest.raises(ValueError) as caught:
        load(args)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400, text
    return text


@pytest.mark.parametrize("name", ["76b_cpt", "7b_cpt", "demo", "moe_demo", "qwen2_5_0_5b_cpt"])
def test_recipes_with_a_shape_load_without_weights(name):
    recipe = load([f"recipe={name}", "dry_run=true"])
    assert recipe.name == name and recipe.run_dir == f"runs/{name}" and list(recipe.stages)


def test_every_recipe_is_covered_above_or_below():
    assert recipe_names() == ["76b_cpt", "7b_cpt", "cpt", "demo", "moe_demo", "qwen2_5_0_5b_cpt", "spike_demo"]


def test_the_generic_recipe_takes_its_shape_from_the_checkpoint(checkpoint):
    recipe = load(["recipe=cpt", f"start.path={checkpoint}"])
    assert (recipe.model.num_layers, recipe.model.head_dim, recipe.model.num_kv_heads) == (4, 8, 2)
    assert recipe.data.tokenizer == checkpoint


def test_the_spiking_demo_goes_on_from_what_the_demo_leaves(tmp_path):
    demo = load(["recipe=demo", "dry_run=true"])
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": demo.model.num_layers}))
    recipe = load(["recipe=spike_demo", f"start.path={tmp_path}"])
    assert recipe.model.spiking.enabled and 0 < recipe.model.spiking.warm_in_tokens < recipe.stages["ctx_1024"].tokens
    assert (recipe.model.pattern, recipe.model.window) == (demo.model.pattern, demo.model.window)
    assert f"path: {demo.export_dir}\n" in (door.RECIPES / "spike_demo.yaml").read_text()


@pytest.mark.parametrize(
    "path", sorted(door.RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_group_file_fits_its_place(path, checkpoint):
    group = "stage@stages.ctx_8k" if path.parent.name == "stage" else path.parent.name
    args = [f"{group}={path.stem}", "dry_run=true"]
    if group == "model":
        args += ["~stages.ctx_32k", "~stages.ctx_128k"]  # their sp does not suit 3 heads
        args += [f"start.path={checkpoint if path.stem == 'from_start' else '/nowhere'}", "model.pattern=L"]
    if group == "data":
        args += ["start.path="]
    assert load(["recipe=7b_cpt", *args])


def test_7b_is_the_reports_run():
    recipe = load(DRY)
    stages = list(recipe.stages.items())
    assert [name for name, _ in stages] == ["ctx_8k", "ctx_32k", "ctx_128k"]
    assert [stage.tokens for _, stage in stages] == [100_000_000_000, 25_000_000_000, 25_000_000_000]
    assert [stage.layout.dp(256) for _, stage in stages] == [256, 64, 32]
    assert [stage.layout.sp for _, stage in stages] == [1, 4, 8]
    assert recipe.cluster.num_gpus == 256 and recipe.model.window == 4097
    assert recipe.precision is Precision.bf16 and stages[2][1].recompute is Recompute.full


def test_demo_changes_its_layout_at_every_stage():
    recipe = load(["recipe=demo", "dry_run=true"])
    layouts = [(s.layout.dp(2), s.layout.pp, s.layout.sp) for s in recipe.stages.values()]
    assert layouts == [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
    assert 45_000 <= sum(stage.tokens for stage in recipe.stages.values()) <= 55_000
    assert recipe.export_dir == "runs/demo/export" and recipe.evaluation.teacher


def test_overrides_of_every_type():
    recipe = load([
        *DRY, "seed=7", "precision=fp32", "stages.ctx_8k.tokens=2_000_000_000", "optim.beta2=0.99", "export_dir=a b/c",
        "stages.ctx_32k.layout.tp=2", "stages.ctx_32k.layout.tp_sequence_parallel=true", "cluster=h200x8",
        "stages.ctx_8k.schedule.decay=wsd", "ops.gla=reference", "stages.ctx_8k.blend.pretrain=2",
        "model.rope_scaling.factor=4", "+data.sources.books.path=books", "model.pattern=SL x 14", "~stages.ctx_128k",
    ])  # fmt: skip
    assert (recipe.seed, recipe.precision, recipe.optim.beta2) == (7, Precision.fp32, 0.99)
    assert list(recipe.stages) == ["ctx_8k", "ctx_32k"]
    assert recipe.stages["ctx_8k"].tokens == 2_000_000_000 and recipe.stages["ctx_8k"].schedule.decay is Decay.wsd
    assert recipe.stages["ctx_32k"].layout.tp_sequence_parallel and recipe.stages["ctx_32k"].layout.tp == 2
    assert recipe.stages["ctx_8k"].blend == {"pretrain": 2.0} and recipe.ops == {"gla": "reference"}
    assert list(recipe.data.sources) == ["pretrain", "books"] and recipe.export_dir == "a b/c"
    assert recipe.model.rope_scaling.factor == 4.0 and recipe.model.rope_scaling.original_max_positions == 8192
    assert recipe.cluster.memory_gib == 141 and recipe.cluster.num_gpus == 256


def test_a_list_of_layers_is_read_and_saved(tmp_path):
    recipe = load([*DRY, "stages.ctx_8k.layout.pp=4", "stages.ctx_8k.layout.pp_layers=[8,8,8,4]"])
    assert recipe.stages["ctx_8k"].layout.pp_layers == (8, 8, 8, 4)
    save(recipe, tmp_path / "recipe.yaml")
    file = f"recipe={tmp_path / 'recipe.yaml'}"
    assert load([file]) == recipe and hash(load([file]).stages["ctx_8k"].layout)
    fewer = ["stages.ctx_8k.layout.pp=2", "stages.ctx_8k.layout.pp_layers=[20,8]"]
    assert load([file, *fewer]).stages["ctx_8k"].layout.pp_layers == (20, 8)


def test_a_stage_can_be_added_and_comes_last():
    recipe = load([*DRY, "+stage@stages.ctx_64k=32k", "stages.ctx_64k.seq_len=65536"])
    assert list(recipe.stages)[-1] == "ctx_64k" and recipe.stages["ctx_64k"].seq_len == 65536


def test_quoted_patterns_reach_the_parser():
    assert "layer 0 is (SL), which is not trainable yet" in message([*DRY, 'model.pattern="(SL) x 28"'])


def test_the_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(DRY).stages["ctx_8k"].layout.tp = 2


@pytest.mark.parametrize("name", ["76b_cpt", "7b_cpt", "demo", "moe_demo", "qwen2_5_0_5b_cpt"])
def test_a_saved_recipe_loads_to_an_equal_one(name, tmp_path):
    recipe = load([f"recipe={name}", "dry_run=true", "+data.sources.x.path='some (odd), path'", "ops.gla=reference"])
    save(recipe, tmp_path / "recipe.yaml")
    again = load([f"recipe={tmp_path / 'recipe.yaml'}"])
    assert again == recipe and list(again.stages) == list(recipe.stages)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_saved_recipe_takes_overrides_and_groups(tmp_path):
    save(load(DRY), tmp_path / "recipe.yaml")
    again = load([f"recipe={tmp_path / 'recipe.yaml'}", "cluster=c550x8", "seed=3", "cluster.num_gpus=512"])
    assert (again.cluster.peak_tflops, again.cluster.num_gpus, again.seed) == (280.0, 512, 3)


def test_a_recipe_of_ones_own_inherits_and_keeps_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [7b_cpt, _self_]\nseed: 5\nstages: {ctx_8k: {micro_batch: 2}}\n")
    recipe = load([f"recipe={tmp_path / 'mine.yaml'}", "dry_run=true"])
    assert (recipe.name, recipe.seed, recipe.stages["ctx_8k"].micro_batch) == ("mine", 5, 2)


def test_loading_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(DRY)
    assert list(tmp_path.iterdir()) == []


def test_yaml_text_has_every_key():
    text = to_yaml(load(DRY))
    assert "tp_sequence_parallel: false" in text and "tokens: 100000000000" in text and "precision: bf16" in text


MISTAKES = [
    (["recipe=7b_cp"], ["recipe=7b_cp does not exist", "did you mean 7b_cpt?", "demo"]),
    (["recipe=zzz"], ["There are: 76b_cpt, 7b_cpt, cpt, demo"]),
    (["recipe=/nowhere/recipe.yaml"], ["recipe=/nowhere/recipe.yaml", "no such file"]),
    (["seed=1"], ["recipe=NAME is missing", "7b_cpt"]),
    (["recipe=7b_cpt", "recipe=demo"], ["recipe=NAME is given more than once"]),
    ([*DRY, "seed=1", "seed=2"], ["seed is given more than once"]),
    ([*DRY, "nope=3"], ["nope is not a key", "run_dir"]),
    ([*DRY, "stages.ctx_8k.tokns=3"], ["stages.ctx_8k.tokns", "did you mean stages.ctx_8k.tokens?"]),
    ([*DRY, "+stages.ctx_8k.layout.cp=3"], ["stages.ctx_8k.layout.cp", "sp"]),
    ([*DRY, "seed.x=3"], ["seed.x is not a key", "seed is an integer"]),
    ([*DRY, "stages.ctx_8k.layout.pp_layers=28"], ["stages.ctx_8k.layout.pp_layers=28 is not a list", "[8,7]"]),
    ([*DRY, "stages.ctx_8k.layout.pp_layers=[9,x]"], ["layout.pp_layers[1]='x' is not an integer"]),
    ([*DRY, "stages.ctx_8k.layout.pp_layers.a=1"], ["layout.pp_layers.a is not a key", "pp_layers is a list"]),
    ([*DRY, "stages.ctx_9k.tokens=3"], ["stages.ctx_9k does not exist", "ctx_8k", "+stages.ctx_9k.tokens"]),
    ([*DRY, "data.sources.books.path=x"], ["data.sources.books does not exist", "+data.sources.books.path"]),
    ([*DRY, "+stages.8k.tokens=3"], ["do not begin with a digit", "ctx_8k"]),
    ([*DRY, "~stages.ctx_9k"], ["stages.ctx_9k", "did you mean stages.ctx_8k?"]),
    ([*DRY, "~seed"], ["~seed", "write seed=VALUE"]),
    ([*DRY, "stages={}"], ["stages={} changes nothing", "~stages.NAME"]),
    ([*DRY, "stages.ctx_8k.tokens=abc"], ["stages.ctx_8k.tokens='abc' is not an integer", "100_000_000"]),
    ([*DRY, "stages.ctx_8k.tokens=1e9"], ["stages.ctx_8k.tokens", "write 1_000_000_000"]),
    ([*DRY, "stages.ctx_8k.micro_batch=true"], ["stages.ctx_8k.micro_batch=True is not an integer"]),
    ([*DRY, "stages.ctx_8k.tokens=null"], ["stages.ctx_8k.tokens=None is not an integer"]),
    ([*DRY, "optim.eps=small"], ["optim.eps='small' is not a number"]),
    ([*DRY, "layout_auto=yes"], ["layout_auto='yes' is not true or false"]),
    ([*DRY, "run_dir=2024"], ["run_dir=2024 is not text", "'run_dir=\"2024\"'"]),
    ([*DRY, "stages.ctx_8k=3"], ["stages.ctx_8k is 3 but holds keys"]),
    ([*DRY, "precision=fp16"], ["precision='fp16' is not a choice", "fp32, bf16"]),
    ([*DRY, "stages.ctx_8k.objective=foo"], ["stages.ctx_8k.objective='foo'", "ce, align, kd, sft"]),
    ([*DRY, "model.pattern=(LS) x 28"], ["needs quotes", "'model.pattern=\"(LS) x 28\"'"]),
    ([*DRY, "run_dir=a,b"], ["needs quotes", "'run_dir=\"a,b\"'"]),
    ([*DRY, "run_dir=a=b"], ["needs quotes", "'run_dir=\"a=b\"'"]),
    ([*DRY, "dry"], ["dry is not an override", "key=value"]),
    ([*DRY, "cluster=h300"], ["recipes/cluster/h300.yaml", "h100x8"]),
    ([*DRY, "run_dir=${nope}"], ["nope"]),
    (["recipe=7b_cpt", "start.path=/nowhere"], ["start.path=/nowhere is not a folder"]),
    (["recipe=cpt", "dry_run=true"], ["model.vocab_size is not known", "start.path"]),
    (["recipe=cpt", "start.path=/nowhere", "dry_run=true"], ["model.vocab_size", "start.path=/nowhere does not exist"]),
]


@pytest.mark.parametrize(("args", "parts"), MISTAKES, ids=[" ".join(args) for args, _ in MISTAKES])
def test_every_mistake_is_one_line(args, parts):
    text = message(args)
    assert all(part in text for part in parts), text


def test_a_given_field_may_not_contradict_the_checkpoint(checkpoint):
    text = message(["recipe=cpt", f"start.path={checkpoint}", "model.num_kv_heads=4"])
    assert "model.num_kv_heads=4" in text and "num_kv_heads 2" in text and checkpoint in text


BROKEN_FILES = [
    ("seed: [1\n", ["broken.yaml", "line", "not valid YAML"]),
    ("seed: 1\nseed: 2\n", ["broken.yaml", "line 2", "duplicate key seed"]),
    ("defaults: [nowhere]\n", ["broken.yaml", "nowhere"]),
    ("defaults: [7b_cpt, _self_]\nstages: {ctx_8k: {tokns: 3}}\ndry_run: true\n", ["stages.ctx_8k.tokns"]),
    ("- a\n- b\n", ["broken.yaml"]),
    ("defaults: [7b_cpt, _self_]\nstages: {8k: {tokens: 3}}\ndry_run: true\n", ["stages", "8k", "not a digit first"]),
]


@pytest.mark.parametrize(("text", "parts"), BROKEN_FILES)
def test_a_broken_file_is_one_line_that_names_it(text, parts, tmp_path):
    (tmp_path / "broken.yaml").write_text(text)
    line = message([f"recipe={tmp_path / 'broken.yaml'}"])
    assert all(part in line for part in parts), line
