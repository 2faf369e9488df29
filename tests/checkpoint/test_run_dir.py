"""Whose a run directory is: which keys make a run another one, and which may change while it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from run_case import tiny_recipe, write_inputs
from sbtrain.checkpoint.run_dir import Exit, check_owner, describe_run, identity, open_run, record_exit, record_start
from sbtrain.config.load import load


@pytest.fixture
def root(tmp_path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


@pytest.fixture
def described(root) -> Path:
    """A run directory that holds recipe.yaml and env.json."""
    describe_run(tiny_recipe(root, "run"))
    return root


def test_identity_has_one_entry_a_key():
    keys = identity(load(["recipe=7b_cpt", "dry_run=true"]))
    assert keys["model.num_layers"] == 28 and keys["stages.ctx_32k.seq_len"] == 32768 and keys["seed"] == 0
    assert keys["data.sources.pretrain.weight"] == 1.0
    for free in ("name", "run_dir", "cluster", "log", "checkpoint", "evaluation", "ops", "export_dir", "layout_auto"):
        assert not [key for key in keys if key.split(".")[0] == free]
    assert not [key for key in keys if any(free in key for free in ("layout", "recompute", "micro_batch", "schedule"))]


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "cluster.num_gpus=4",
        "log.every_steps=5",
        "checkpoint.every_steps=1",
        "evaluation.tokens=64",
        "export_dir=somewhere",
        "ops.gla=reference",
        "layout_auto=true",
        "stages.ctx_64.layout.pp=1",
        "stages.ctx_32.recompute=full",
        "stages.ctx_32.micro_batch=1",
    ],
)
def test_a_run_goes_on_with_other_hardware_logging_and_checkpoints(described, override):
    check_owner(tiny_recipe(described, "run", override))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=4", "seed is 3 there and 4 here"),
        ("precision=bf16", "precision is "),
        ("model.pattern=SSF", "model.pattern is LSF there and SSF here"),
        ("model.gla.gate_rank=5", "model.gla.gate_rank is 4 there and 5 here"),
        ("optim.weight_decay=0.2", "optim.weight_decay is 0.1 there and 0.2 here"),
        ("data.sources.one.weight=3.0", "data.sources.one.weight is 2.0 there and 3.0 here"),
        ("stages.ctx_64.tokens=1024", "stages.ctx_64.tokens is 512 there and 1024 here"),
        ("stages.ctx_64.seq_len=32", "stages.ctx_64.seq_len is 64 there and 32 here"),
        ("stages.ctx_32.blend={one:1.0}", "stages.ctx_32.blend is {} there and absent here"),
        ("~stages.ctx_128", " there and absent here"),
        ("+stages.more={seq_len:32,tokens:128,global_batch_tokens:128}", "is absent there and "),
    ],
)
def test_another_recipe_is_refused_by_the_name_of_a_key(described, override, key):
    with pytest.raises(ValueError) as caught:
        check_owner(tiny_recipe(described, "run", override))
    text = str(caught.value)
    assert "\n" not in text and key in text
    assert text.startswith(f"run_dir={described / 'run'} belongs to another recipe: ") and "another run_dir" in text


def test_stages_in_another_order_are_another_recipe(described):
    recipe = tiny_recipe(described, "run")
    with pytest.raises(ValueError, match="the order of stages is ctx_32, ctx_64, ctx_128 there and ctx_128, "):
        check_owner(replace(recipe, stages=dict(reversed(recipe.stages.items()))))


def test_a_run_without_its_folder_or_checkpoint_is_named(described):
    with pytest.raises(ValueError, match=r"none is no run directory \(no recipe.yaml\)"):
        open_run(described / "none")
    with pytest.raises(ValueError, match="run has no checkpoint yet"):
        open_run(described / "run")


def test_a_file_is_no_folder(root):
    (root / "file").write_text("x")
    for folder in (root / "file", root / "file/below"):
        with pytest.raises(ValueError, match=r"run_dir=.*: .*/file is a file; choose a folder"):
            check_owner(replace(tiny_recipe(root, "run"), run_dir=str(folder)))


def test_a_folder_that_is_not_ours_is_refused_and_an_empty_one_is_not(root):
    recipe = tiny_recipe(root, "theirs")
    check_owner(recipe)
    (root / "theirs").mkdir()
    check_owner(recipe)
    (root / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"theirs is not empty and holds no recipe\.yaml; choose a new run_dir"):
        check_owner(recipe)


def test_the_description_reproduces_the_recipe(described):
    recipe = tiny_recipe(described, "run")
    assert load([f"recipe={described / 'run' / 'recipe.yaml'}"]) == recipe
    environment = json.loads((described / "run" / "env.json").read_text())
    assert environment["megatron_core"] == "0.16.1" and environment["torch"]
    assert environment["ops"] and environment["ops_hash"]


def test_what_starts_recorded_survives_new_starts_and_goes_where_steps_are_done_again(described):
    recipe, path = tiny_recipe(described, "run"), described / "run" / "env.json"
    starts = [dict(stage="a", step=0), dict(stage="a", step=4), dict(stage="b", step=6)]
    for start in starts:
        record_start(recipe.run_dir, start)
        describe_run(recipe)
    assert json.loads(path.read_text())["starts"] == starts
    again = dict(stage="a", step=4, sp=2)
    record_start(recipe.run_dir, again)
    environment = json.loads(path.read_text())
    assert environment["starts"] == [starts[0], again] and environment["ops"]


@pytest.mark.parametrize("text", ["{", "[]", '{"starts": 3}', '{"starts": [3, {"stage": "a"}]}'])
def test_an_environment_that_was_damaged_stops_no_run(described, text):
    (described / "run" / "env.json").write_text(text)
    describe_run(tiny_recipe(described, "run"))
    assert json.loads((described / "run" / "env.json").read_text())["starts"] == []


def test_the_exit_is_recorded_only_where_there_is_a_run(described):
    recipe = tiny_recipe(described, "run")
    record_exit(recipe.run_dir, Exit.REQUEUE, "SIGTERM")
    assert json.loads((described / "run" / "exit.json").read_text()) == {"code": 75, "reason": "SIGTERM"}
    record_exit(described / "none", 2, "no")
    assert not (described / "none").exists()


def test_an_earlier_end_does_not_speak_for_one_that_cannot_be_recorded(described, monkeypatch, capsys):
    """The disk is full: who reads exit.json must not start a run again that was refused."""
    folder = described / "run"
    record_exit(folder, Exit.RANK_LOST, "rank 1 is gone")

    def no_room(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("sbtrain.checkpoint.run_dir.write_json", no_room)
    record_exit(folder, Exit.BAD_RECIPE, "no space left")
    assert not (folder / "exit.json").exists()
    assert capsys.readouterr().err == f"{folder / 'exit.json'}: No space left on device\n"
