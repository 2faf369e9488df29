"""Bad input on the command line: exit 2, one line naming the key or file and the fix, nothing written or lost."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from run_case import write_inputs
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.config.load import load
from sbtrain.plan.memory import checkpoint_bytes
from sbtrain.run import convert
from sbtrain.train.watch import Watch

ROOT = Path(__file__).resolve().parents[1]
ONE_STAGE = ("~stages.ctx_64", "~stages.ctx_128")
ONE_PROCESS = ("stages.ctx_64.layout.pp=1", "stages.ctx_128.layout.sp=1")
Usage = namedtuple("Usage", "total used free")


class Site:
    """A folder with a recipe and its inputs; launch/train.py works in it, in this process."""

    def __init__(self, root: Path, capture):
        self.root, self._capture = root, capture
        self._train = runpy.run_path(str(ROOT / "launch" / "train.py"))["train"]
        self.recipe = write_inputs(root)
        self.run_dir = root / "run"

    def train(self, *overrides: str, recipe: str = "") -> tuple[int, str]:
        """Exit code and stderr of `train.py recipe=tiny run_dir=run overrides`."""
        self._capture.readouterr()
        code = self._train([f"recipe={recipe or self.recipe}", f"run_dir={self.run_dir}", *overrides])
        return code, self._capture.readouterr().err

    def files(self, but: tuple[str, ...] = ()) -> dict[str, tuple[bytes, int]]:
        """Content and time of every file, and every folder."""
        paths = [path for path in sorted(self.root.rglob("*")) if path.name not in but]
        return {
            str(path.relative_to(self.root)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
            for path in paths
        }

    def refuses(self, overrides: tuple[str, ...], mentions: list[str], *, recipe: str = "") -> None:
        """The rule of this file."""
        before = self.files(but=("exit.json",))
        code, line = self.train(*overrides, recipe=recipe)
        assert code == 2, line
        assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
        assert [word for word in mentions if word not in line] == [], line
        after = self.files(but=("exit.json",))
        assert sorted(after) == sorted(before)
        assert [name for name in before if before[name] != after[name]] == []


@pytest.fixture
def site(tmp_path, monkeypatch, capfd) -> Site:
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.chdir(tmp_path)
    return Site(tmp_path, capfd)


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


def _teacher(folder: Path) -> None:
    """A checkpoint of the tiny recipe's shape, in several shards."""
    config = transformers.Qwen2Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


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
    "truncated": (lambda f: _truncate(sorted(f.glob("*.safetensors"))[-1]), ["model-0", "truncated", "download it"]),
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


def _corrupt_ids(path: Path) -> None:
    with open(path, "r+b") as file:  # in place: a run may have it mapped
        file.write(b"\xff\xff" * (path.stat().st_size // 2))


SPOILED_DATA: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda r: (r / "one.bin").unlink(), ["one.bin is missing", "prepare_data"]),
    "empty": (lambda r: (r / "two.bin").write_bytes(b""), ["two.bin is truncated: 0 bytes", "copy it again"]),
    "truncated": (lambda r: _truncate(r / "one.bin"), ["one.bin is truncated", "copy it again"]),
    "index": (lambda r: _truncate(r / "one.idx"), ["one.idx has", "copy it again or rerun prepare_data"]),
    "no index": (lambda r: (r / "one.idx").write_bytes(b"x" * 100), ["one.idx is not a megatron index"]),
    "description": (lambda r: (r / "two.json").write_text("{}"), ["two.json lacks num_tokens", "rerun prepare_data"]),
    "of two runs": (lambda r: shutil.copy(r / "one.json", r / "two.json"), ["two.idx has", "not of one run"]),
    "held-out": (lambda r: _truncate(r / "held.bin"), ["held.bin is truncated", "copy it again"]),
    "held-out ids": (lambda r: _corrupt_ids(r / "held.bin"), ["held.bin is corrupt", "65535", "rerun prepare_data"]),
    "ids": (lambda r: _corrupt_ids(r / "one.bin"), ["one.bin is corrupt", "65535", "rerun prepare_data"]),
    "tokenizer": (lambda r: (r / "tokenizer/tokenizer.json").unlink(), ["tokenizer.json is missing", "data.tokenizer"]),
    "tokenizer file": (lambda r: _truncate(r / "tokenizer/tokenizer.json"), ["tokenizer.json is not a readable"]),
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


@pytest.fixture
def stopped(site, monkeypatch) -> Site:
    """A run that SIGTERM stopped after step 4 of 6; it has saved step 3 and 4."""
    check = Watch.check

    def check_and_stop(self, state, **figures):
        check(self, state, **figures)
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "check", check_and_stop)
        code, _ = site.train(*ONE_STAGE)
    assert code == 75 and Ledger(site.run_dir).step == 4
    return site


def exit_of(site: Site) -> dict:
    return json.loads((site.run_dir / "exit.json").read_text())


def test_exit_json_says_how_it_ended(stopped):
    assert exit_of(stopped) == {"code": 75, "reason": "SIGTERM"}
    assert stopped.train(*ONE_STAGE)[0] == 0
    assert exit_of(stopped) == {"code": 0, "reason": "all stages are done"}
    assert stopped.train(*ONE_STAGE)[0] == 0, "a run that is done has nothing to do"
    assert exit_of(stopped)["code"] == 0


@pytest.mark.parametrize("override", ["stages.ctx_32.layout.tp=4", "seed=three", "evaluation.tokens=-1"])
def test_a_refused_restart_replaces_what_asked_for_one(stopped, override):
    """A batch script that reads exit.json must not start a broken command again and again."""
    assert exit_of(stopped)["code"] == 75
    code, line = stopped.train(*ONE_STAGE, override)
    assert code == 2 and exit_of(stopped) == {"code": 2, "reason": line.removeprefix("error: ").rstrip("\n")}


def test_a_run_directory_of_another_recipe(stopped):
    belongs = f"run_dir={stopped.run_dir} belongs to another recipe: "
    stopped.refuses((*ONE_STAGE, "seed=4"), [belongs, "seed is 3 there and 4 here", "choose another run_dir"])
    stopped.refuses(ONE_PROCESS, [belongs, "stages.ctx_128", "absent there", "choose another run_dir"])
    assert exit_of(stopped)["code"] == 2 and "belongs to another recipe" in exit_of(stopped)["reason"]


def test_no_space_left(stopped, monkeypatch):
    """Noticed before a step is trained that could not be saved, on a new run and on one that goes on."""
    need = checkpoint_bytes(load([f"recipe={stopped.recipe}", *ONE_STAGE]))
    size = sum(path.stat().st_size for path in (stopped.run_dir / "checkpoints/step_4").glob("*.distcp"))
    assert need <= size < 1.5 * need, "the estimate is what checkpoints have, but for their headers"
    mentions = ["no space left in ", "run/checkpoints", "free some space and start the same command again"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, need - 1))
    stopped.refuses(ONE_STAGE, mentions)
    shutil.rmtree(stopped.run_dir)
    stopped.refuses(ONE_STAGE, mentions)


def test_no_space_left_for_a_conversion(stopped, monkeypatch):
    """It needs room for the weights alone, and leaves nothing where there is none."""
    recipe = load([f"recipe={stopped.recipe}", *ONE_STAGE, f"run_dir={stopped.root / 'other'}"])
    need = checkpoint_bytes(recipe, optimizer=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, need - 1))
    with pytest.raises(ValueError, match="no space left in .*other/checkpoints"):
        convert(recipe)
    assert not (stopped.root / "other").exists()


def test_conversion_of_a_dry_run_writes_nothing(site):
    convert_command = runpy.run_path(str(ROOT / "launch" / "convert.py"))["convert"]
    before = site.files()
    assert convert_command([f"recipe={site.recipe}", f"run_dir={site.run_dir}", "dry_run=true"]) == 0
    assert convert_command([f"recipe={site.recipe}", f"run_dir={site.run_dir}", "ops.nope=cuda"]) == 2
    assert site.files() == before


def test_space_that_runs_out_during_the_run(stopped, monkeypatch):
    """The next checkpoint is refused; the run stands where it stood and goes on when there is space."""
    before, check = stopped.files(), Watch.check

    def check_and_fill_up(self, state, **figures):
        check(self, state, **figures)
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 1000))

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "check", check_and_fill_up)
        code, line = stopped.train(*ONE_STAGE)
    assert code == 2 and line.count("\n") == 1 and line.startswith("error: no space left in ")
    after, lasting = stopped.files(), ("ledger.json", "checkpoints", "recipe.yaml")
    for name in {name for name in {*before, *after} if any(part in name for part in lasting)}:
        assert (before[name] and before[name][0]) == (after[name] and after[name][0]), name
    assert exit_of(stopped)["code"] == 2 and exit_of(stopped)["reason"].startswith("no space left")
    assert stopped.train(*ONE_STAGE)[0] == 0 and Ledger(stopped.run_dir).step == 6


def test_a_torn_character_in_the_metrics_is_a_torn_line(stopped):
    with open(stopped.run_dir / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "note": "\xc3')
    assert stopped.train(*ONE_STAGE)[0] == 0
    lines = (stopped.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SPOILED_RUNS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "format": (
        lambda r: _edit(r / "checkpoints/step_4/state.json", format=7),
        ["step_4/state.json: checkpoint format 7 is not 1", "load it with the version of sbtrain that wrote it"],
    ),
    "state": (lambda r: (r / "checkpoints/step_4/state.json").unlink(), ["step_4 is not a complete checkpoint"]),
    "metadata": (lambda r: (r / "checkpoints/step_4/.metadata").unlink(), ["step_4 is not a complete checkpoint"]),
    "gone": (lambda r: shutil.rmtree(r / "checkpoints/step_4"), ["step_4 is not a complete checkpoint", "step_N"]),
    "ledger": (lambda r: (r / "ledger.json").write_text('{"step": 4'), ["ledger.json is not valid JSON", "run_dir"]),
    "no ledger": (lambda r: (r / "ledger.json").write_text("{}"), ["ledger.json lacks", "restore it from a copy"]),
    "recipe": (lambda r: (r / "recipe.yaml").write_text("name: [tiny"), ["recipe.yaml", "not valid YAML"]),
    "evaluation": (lambda r: (r / "evaluation.json").write_text("["), ["evaluation.json is not valid JSON"]),
    "points": (lambda r: (r / "evaluation.json").write_text("{}"), ["evaluation.json holds no points"]),
    "no tensor format": (
        lambda r: (r / "checkpoints/step_4/metadata.json").unlink(),
        ["step_4 is not a complete checkpoint (metadata.json is missing)"],
    ),
    "tensor format": (
        lambda r: _edit(r / "checkpoints/step_4/metadata.json", sharded_backend="zarr"),
        ["step_4/metadata.json", "in the format 'zarr', not in torch_dist"],
    ),
    "half a tensor format": (
        lambda r: (r / "checkpoints/step_4/metadata.json").write_text("{"),
        ["step_4/metadata.json is not valid JSON"],
    ),
    "no common part": (lambda r: (r / "checkpoints/step_4/common.pt").unlink(), ["common.pt is missing"]),
    "half a state": (
        lambda r: (r / "checkpoints/step_4/state.json").write_text('{"format": 1}'),
        ["step_4/state.json lacks parts"],
    ),
}


@pytest.mark.parametrize("problem", SPOILED_RUNS)
def test_a_run_that_was_damaged(stopped, problem):
    spoil, mentions = SPOILED_RUNS[problem]
    spoil(stopped.run_dir)
    stopped.refuses(ONE_STAGE, [str(stopped.run_dir), *mentions])


SPOILED_TENSORS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: _truncate(max(f.glob("*.distcp"), key=lambda path: path.stat().st_size)),
    "missing": lambda f: max(f.glob("*.distcp"), key=lambda path: path.stat().st_size).unlink(),
    "metadata": lambda f: (f / ".metadata").write_bytes(b"garbage"),
    "common": lambda f: _truncate(f / "common.pt"),
}


@pytest.mark.parametrize("problem", SPOILED_TENSORS)
def test_a_checkpoint_whose_tensors_cannot_be_read(stopped, problem):
    """Found when it is loaded; the run stays as it was, and goes on from the checkpoint before when it is told to."""
    folder = stopped.run_dir / "checkpoints/step_4"
    SPOILED_TENSORS[problem](folder)
    before = stopped.files(but=("exit.json",))
    code, line = stopped.train(*ONE_STAGE)
    assert code == 2 and line.startswith(f"error: {folder} cannot be read (") and line.count("\n") == 1
    assert "point ledger.json at an earlier checkpoints/step_N" in line
    after = stopped.files(but=("exit.json",))
    assert {name: it and it[0] for name, it in after.items()} == {name: it and it[0] for name, it in before.items()}
    _edit(stopped.run_dir / "ledger.json", checkpoint="checkpoints/step_3", step=3)
    assert stopped.train(*ONE_STAGE)[0] == 0 and Ledger(stopped.run_dir).step == 6
