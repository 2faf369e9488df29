"""Bad input on the command line: exit 2, one line naming the key or file and the fix, nothing written or lost."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from command_line import ONE_STAGE, ROOT, truncate
from sbtrain.checkpoint.starts import STOP, next_start
from sbtrain.train.watch import Watch


@pytest.mark.parametrize(
    ("recipe", "mentions"),
    [
        ("7b_cptt", ["recipe=7b_cptt does not exist", "did you mean 7b_cpt?", "demo"]),
        ("nowhere.yaml", ["recipe=nowhere.yaml: there is no such file", "demo"]),
    ],
)
def test_unknown_recipe(site, recipe, mentions):
    site.refuses((), mentions, recipe=recipe)


@pytest.mark.parametrize(
    ("override", "mentions"),
    [
        ("model.windoww=3", ["model.windoww is not a key", "did you mean model.window?"]),
        ("stages.ctx_32.layout.dp=2", ["stages.ctx_32.layout.dp is not a key"]),
        ("stages.ctx_8k.tokens=3", ["stages.ctx_8k does not exist", "ctx_32, ctx_64, ctx_128", "+stages.ctx_8k"]),
        ("model=nothing", ["recipes/model/nothing.yaml", "qwen2_5_7b"]),
        ("seed=three", ["seed='three' is not an integer", "write for example"]),
        ("model.num_layers=2.5", ["model.num_layers=2.5 is not an integer"]),
        ("stages.ctx_32.tokens=1e3", ["stages.ctx_32.tokens=1000.0 is not an integer; write 1_000"]),
        ("stages.ctx_32.schedule.decay=linear", ["decay='linear' is not a choice", "constant, cosine, wsd"]),
        ("evaluation.teacher=2", ["evaluation.teacher=2 is not true or false"]),
        ("seed", ["seed is not an override; write key=value"]),
    ],
)
def test_unknown_key_or_wrong_type(site, override, mentions):
    site.refuses((override,), mentions)


def test_a_recipe_file_with_a_typo(site):
    text = site.recipe.read_text()
    site.recipe.write_text(text.replace("hidden_size", "hiden_size"))
    site.refuses((), ["model.hiden_size is not a key", "did you mean model.hidden_size?"])
    site.recipe.write_text(text + "optim: [unclosed\n")
    site.refuses((), [str(site.recipe), "not valid YAML", "line", "correct that line"])


@pytest.mark.parametrize(
    ("overrides", "mentions"),
    [
        (("tp=3",), ["layout.tp=3 does not divide model.num_heads=4; choose a tp that does"]),
        (("tp=4",), ["layout.tp=4 does not divide model.num_kv_heads=2"]),
        (("pp=4",), ["layout.pp=4 exceeds model.num_layers=3; lower it"]),
        (("sp=5",), ["layout.sp=5 does not divide seq_len=32; choose an sp that does"]),
        (("ep=2",), ["layout.ep=2", "mixture-of-experts"]),
        (("tp=0",), ["layout.tp=0 must be 1 or more"]),
        (("tp=2",), ["= 2 ranks do not divide the world of 1", "smallest world that fits all stages is 2"]),
        (("pp=3", "sp=2"), ["= 6 ranks do not divide the world of 1", "smallest world", "6", "layout_auto=true"]),
    ],
)
def test_layout_that_does_not_divide(site, overrides, mentions):
    layout = tuple(f"stages.ctx_32.layout.{override}" for override in overrides)
    site.refuses((*ONE_STAGE, *layout), ["stages.ctx_32", *mentions])


ROWS_OF_48 = ("seq_len=48", "micro_batch=1", "global_batch_tokens=96", "tokens=192")


@pytest.mark.parametrize(
    ("overrides", "mentions"),
    [
        (("layout.sp=64",), ["layout.sp=64 does not divide seq_len=32; choose an sp that does"]),  # more than tokens
        ((*ROWS_OF_48, "layout.sp=5"), ["layout.sp=5 does not divide seq_len=48"]),
        (
            (*ROWS_OF_48, "layout.sp=3"),
            ["layout.sp=3 is larger than the 2 key/value heads of a tp rank and no multiple; choose an sp up to 2"],
        ),
        (
            ("layout.sp=2", "layout.sp_algorithm.S=halo", "model.window=33"),
            ["layout.sp_algorithm.S=halo: the window of 33 tokens is longer than seq_len=32; choose ulysses"],
        ),
        (("layout.sp_algorithm.S=lasp2",), ["layout.sp_algorithm.S=lasp2: softmax attention has no state"]),
        (("layout.sp=2", "layout.sp_algorithm.S=zeco"), ["sp_algorithm.S=zeco: softmax", "choose halo or ulysses"]),
        (("layout.sp=2", "layout.sp_algorithm.F=halo"), ["sp_algorithm.F=halo: full attention", "choose ulysses"]),
        (("layout.sp=2", "layout.sp_algorithm.L=halo"), ["sp_algorithm.L=halo: linear", "choose lasp2 or zeco"]),
        (("layout.sp_algorithm.L=ring",), ["L='ring' is not a choice", "auto, ulysses, lasp2, zeco, halo"]),
        (("layout.sp_algorithm=zeco",), ["sp_algorithm"]),
        (("layout.sp=-2",), ["layout.sp=-2 must be 1 or more"]),
        (("layout.sp=8", "evaluation.seq_len=60"), ["evaluation.seq_len: 60 tokens cannot be cut into the 8 shards"]),
        (("layout.sp=2",), ["sp 2 = 2 ranks do not divide the world of 1", "smallest world"]),
    ],
)
def test_sequence_parallelism_that_cannot_be(site, overrides, mentions):
    whole = ("model.", "evaluation.")
    given = tuple(text if text.startswith(whole) else f"stages.ctx_32.{text}" for text in overrides)
    site.refuses((*ONE_STAGE, *given), mentions)


def _teacher(folder: Path) -> None:
    """A checkpoint of the tiny recipe's shape, in several shards."""
    config = transformers.Qwen2Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")


def _rename_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("layers.2.mlp.up_proj", "layers.2.mlp.upper_proj"))


def _rename_everywhere(folder: Path) -> None:
    _rename_in_index(folder)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes().replace(b"layers.2.mlp.up_proj", b"layers.2.mlp.UP_proj"))
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("upper_proj", "UP_proj"))


SPOILED_WEIGHTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), ["model-00002-of-", "is missing", "download"]),
    "truncated": (lambda f: truncate(sorted(f.glob("*.safetensors"))[-1]), ["model-0", "truncated", "download it"]),
    "empty": (lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b""), ["model-00001", "truncated", "download"]),
    "index": (_rename_in_index, ["index.json says that", "upper_proj", "download both"]),
    "renamed": (_rename_everywhere, ["holds no tensor model.layers.2.mlp.up_proj.weight", "start.path"]),
    "none": (lambda f: [path.unlink() for path in f.glob("model*")], ["start.path", "holds neither model.safetensors"]),
    "folder": (lambda f: shutil.rmtree(f), ["start.path=", "is not a folder; give one with config.json"]),
    "config": (
        lambda f: (f / "config.json").write_text("{"),
        ["config.json", "not readable JSON", "fetch the file again"],
    ),
}


@pytest.mark.parametrize("problem", SPOILED_WEIGHTS)
def test_source_weights_that_are_missing_or_damaged(site, problem):
    spoil, mentions = SPOILED_WEIGHTS[problem]
    _teacher(site.root / "teacher")
    spoil(site.root / "teacher")
    site.refuses((*ONE_STAGE, f"start.path={site.root / 'teacher'}"), [str(site.root / "teacher"), *mentions])


def test_source_weights_of_another_shape(site):
    _teacher(site.root / "teacher")
    start = f"start.path={site.root / 'teacher'}"
    site.refuses((*ONE_STAGE, start, "model.hidden_size=64"), ["model.hidden_size=64 contradicts", "drop model.hidden"])
    config = json.loads((site.root / "teacher/config.json").read_text())
    (site.root / "teacher/config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    site.refuses(
        (*ONE_STAGE, start, "model.ffn_size=50"), ["gate_proj.weight has shape [48, 32]", "[50, 32]", "model."]
    )


def _unseal(prefix: Path) -> None:
    """A corpus from before there were checksums, whose ids no vocabulary has."""
    path = prefix.with_suffix(".json")
    about = json.loads(path.read_text())
    del about["checksums"]
    path.write_text(json.dumps(about))
    _corrupt_ids(prefix.with_suffix(".bin"))


def _corrupt_ids(path: Path) -> None:
    with open(path, "r+b") as file:  # in place: a run may have it mapped
        file.write(b"\xff\xff" * (path.stat().st_size // 2))


SPOILED_DATA: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda r: (r / "one.bin").unlink(), ["one.bin is missing", "prepare_data"]),
    "empty": (lambda r: (r / "two.bin").write_bytes(b""), ["two.bin is truncated: 0 bytes", "copy it again"]),
    "truncated": (lambda r: truncate(r / "one.bin"), ["one.bin is truncated", "copy it again"]),
    "index": (lambda r: truncate(r / "one.idx"), ["one.idx has", "copy it again or rerun prepare_data"]),
    "no index": (lambda r: (r / "one.idx").write_bytes(b"x" * 100), ["one.idx is not a megatron index"]),
    "description": (lambda r: (r / "two.json").write_text("{}"), ["two.json lacks num_tokens", "rerun prepare_data"]),
    "of two runs": (lambda r: shutil.copy(r / "one.json", r / "two.json"), ["two.idx has", "not of one run"]),
    "held-out": (lambda r: truncate(r / "held.bin"), ["held.bin is truncated", "copy it again"]),
    "held-out ids": (lambda r: _corrupt_ids(r / "held.bin"), ["held.bin is corrupt", "checksum", "rerun prepare_data"]),
    "ids": (lambda r: _corrupt_ids(r / "one.bin"), ["one.bin is corrupt", "checksum", "rerun prepare_data"]),
    "unsealed ids": (lambda r: _unseal(r / "one"), ["one.bin is corrupt", "65535", "rerun prepare_data"]),
    "checksums": (lambda r: truncate(r / "one.crc"), ["one.crc is corrupt", "copy it again"]),
    "tokenizer": (lambda r: (r / "tokenizer/tokenizer.json").unlink(), ["tokenizer.json is missing", "data.tokenizer"]),
    "tokenizer file": (lambda r: truncate(r / "tokenizer/tokenizer.json"), ["tokenizer.json is not a readable"]),
}


@pytest.mark.parametrize("problem", SPOILED_DATA)
def test_data_that_is_empty_or_corrupt(site, problem):
    spoil, mentions = SPOILED_DATA[problem]
    spoil(site.root)
    site.refuses(ONE_STAGE, [str(site.root), *mentions])


def test_tokenizer_that_does_not_match(site):
    size = (*ONE_STAGE, "model.vocab_size=200")
    site.refuses(size, ["tokenizer.json has ids up to 259", "model.vocab_size is 200", "belongs to the model"])
    tokenizer = site.root / "tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    site.refuses(ONE_STAGE, ["one.json was made with another tokenizer.json", "rerun prepare_data"])


def test_a_folder_that_is_not_a_run(site):
    site.run_dir.mkdir()
    (site.run_dir / "thesis.tex").write_text("years of work")
    site.refuses(ONE_STAGE, [f"run_dir={site.run_dir} is not empty and holds no recipe.yaml; choose a new run_dir"])
    assert not (site.run_dir / "exit.json").exists()


def test_data_that_turns_out_corrupt_while_training(site, monkeypatch):
    """The ids themselves are read when they are needed."""
    check = Watch.check

    def check_and_corrupt(self, state, **figures):
        check(self, state, **figures)
        _corrupt_ids(site.root / "one.bin")

    monkeypatch.setattr(Watch, "check", check_and_corrupt)
    code, line = site.train(*ONE_STAGE)
    assert code == 2 and line.count("\n") == 1
    assert "one.bin is corrupt" in line and "rerun prepare_data" in line


def test_too_many_skipped_steps_are_no_reason_to_start_again(site, monkeypatch):
    check = Watch.check
    monkeypatch.setattr(Watch, "check", lambda self, state, **given: check(self, state, **{**given, "loss": math.nan}))
    code, line = site.train(*ONE_STAGE, "watch.max_skipped_steps=2")
    assert code == 2 and line.count("\n") == 1
    assert "error: step 3 of stage ctx_32: loss nan" in line and "watch.max_skipped_steps=2" in line
    assert json.loads((site.run_dir / "exit.json").read_text())["code"] == 2
    start = {"job": "1", "restart": 0, "nodes": "n", "signal": ""}
    assert next_start(site.run_dir, start, code=2, told_to_stop=False, idle_starts=3)[0] == STOP


def test_conversion_of_a_dry_run_writes_nothing(site):
    convert_command = runpy.run_path(str(ROOT / "launch" / "convert.py"))["convert"]
    before = site.files()
    assert convert_command([f"recipe={site.recipe}", f"run_dir={site.run_dir}", "dry_run=true"]) == 0
    assert convert_command([f"recipe={site.recipe}", f"run_dir={site.run_dir}", "ops.nope=cuda"]) == 2
    assert site.files() == before
