"""Run directories on the command line: how a run ended, whose it is, disks that are full, files that are damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import ONE_PROCESS, ONE_STAGE, Site, truncate
from run_case import curve, run_until, tiny_recipe, write_inputs
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.lock import RunLock
from sbtrain.checkpoint.manifest import measure, seal
from sbtrain.config.load import load
from sbtrain.plan.memory import checkpoint_bytes
from sbtrain.run import convert
from sbtrain.train.watch import Watch

Usage = namedtuple("Usage", "total used free")


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple]:
    """What a run that nobody disturbed recorded of its steps."""
    root = tmp_path_factory.mktemp("undisturbed")
    write_inputs(root)
    assert run_until(0, tiny_recipe(root, "run", *ONE_STAGE)) == 0
    return curve(root / "run")


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


def test_what_a_killed_start_began_to_write_is_no_reason_to_refuse_the_next_one(stopped, monkeypatch):
    """It may be what fills the disk; it goes before anybody asks for room."""
    part = stopped.run_dir / "checkpoints/step_9.partial"
    part.mkdir()
    (part / "__0_0.distcp").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 0 if part.exists() else 10**12))
    assert stopped.train(*ONE_STAGE)[0] == 0 and Ledger(stopped.run_dir).step == 6


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
    assert "MB and 1.00 kB are free" in line or "kB and 1.00 kB are free" in line
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


SPOILED: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: truncate(_largest(f)),
    "missing": lambda f: _largest(f).unlink(),
    "a bit": lambda f: _flip(_largest(f)),
    "index": lambda f: (f / ".metadata").write_bytes(b"garbage"),
    "no index": lambda f: (f / ".metadata").unlink(),
    "common": lambda f: truncate(f / "common.pt"),
    "no common part": lambda f: (f / "common.pt").unlink(),
    "state": lambda f: (f / "state.json").write_text('{"format": 1}'),
    "no tensor format": lambda f: (f / "metadata.json").unlink(),
    "manifest": lambda f: (f / "manifest.json").write_text("{"),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "all": shutil.rmtree,
}


def _largest(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("problem", SPOILED)
def test_a_damaged_checkpoint_is_skipped_and_the_run_ends_as_it_would_have(stopped, undisturbed, problem):
    folder = stopped.run_dir / "checkpoints/step_4"
    SPOILED[problem](folder)
    code, _ = stopped.train(*ONE_STAGE)
    assert code == 0 and Ledger(stopped.run_dir).step == 6
    (line,) = [line for line in stopped.out.splitlines() if line.startswith("skipped ")]
    assert line.startswith(f"skipped {folder}: ")
    assert curve(stopped.run_dir) == undisturbed


def test_a_removed_or_damaged_ledger_is_made_again(stopped, undisturbed):
    ledger = stopped.run_dir / "ledger.json"
    for content in (None, '{"step": 4', "{}", '{"stages_done": [], "checkpoint": "../../x/step_9", "step": 9}'):
        ledger.unlink() if content is None else ledger.write_text(content)
        code, _ = stopped.train(*ONE_STAGE)
        assert code == 0 and "it is made again from checkpoints/step_" in stopped.out
        assert curve(stopped.run_dir) == undisturbed and Ledger(stopped.run_dir).stages_done == ["ctx_32"]


def test_a_run_whose_checkpoints_are_all_damaged(stopped):
    """It must not begin again by itself."""
    for step in (3, 4):
        truncate(_largest(stopped.run_dir / f"checkpoints/step_{step}"))
    mentions = [f"no checkpoint of {stopped.run_dir} can be used (", "step_4: ", "step_3: ", "another run_dir to begin"]
    stopped.refuses(ONE_STAGE, mentions)


def _reseal(folder: Path) -> None:
    """Give the folder a manifest of what it holds now."""
    (folder / "manifest.json").unlink()
    aside = folder.rename(folder.with_name("aside"))
    seal(aside, folder, measure(aside, [path.name for path in aside.iterdir()]))


SPOILED_RUNS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "format": (
        lambda r: _edit(r / "checkpoints/step_4/state.json", format=7),
        ["step_4/state.json: checkpoint format 7 is not 1", "load it with the version of sbtrain that wrote it"],
    ),
    "recipe": (lambda r: (r / "recipe.yaml").write_text("name: [tiny"), ["recipe.yaml", "not valid YAML"]),
    "evaluation": (lambda r: (r / "evaluation.json").write_text("["), ["evaluation.json is not valid JSON"]),
    "points": (lambda r: (r / "evaluation.json").write_text("{}"), ["evaluation.json holds no points"]),
    "tensor format": (
        lambda r: _edit(r / "checkpoints/step_4/metadata.json", sharded_backend="zarr"),
        ["step_4/metadata.json", "in the format 'zarr', not in torch_dist"],
    ),
    "half a tensor format": (
        lambda r: (r / "checkpoints/step_4/metadata.json").write_text("{"),
        ["step_4/metadata.json is not valid JSON"],
    ),
    "half a state": (
        lambda r: (r / "checkpoints/step_4/state.json").write_text('{"format": 1}'),
        ["step_4/state.json lacks parts"],
    ),
}


@pytest.mark.parametrize("problem", SPOILED_RUNS)
def test_what_is_not_ours_is_refused_and_not_skipped(stopped, problem):
    """Checksums hold here: another version wrote the checkpoint, or a part of the run cannot be replaced."""
    spoil, mentions = SPOILED_RUNS[problem]
    spoil(stopped.run_dir)
    _reseal(stopped.run_dir / "checkpoints/step_4")
    stopped.refuses(ONE_STAGE, [str(stopped.run_dir), *mentions])


def test_a_second_job_touches_nothing(stopped):
    """It is refused in one line; how the first one ends is the first one's to say."""
    (stopped.run_dir / "exit.json").unlink()
    lock = RunLock(stopped.run_dir, job="7")
    assert lock.take() is None
    try:
        mentions = [f"run_dir={stopped.run_dir} is in use by host ", f"process {os.getpid()}, job 7; wait for its end"]
        stopped.refuses(ONE_STAGE, mentions)
        stopped.refuses((*ONE_STAGE, "seed=three"), ["seed"])
        assert not (stopped.run_dir / "exit.json").exists()
    finally:
        lock.release()
    assert stopped.train(*ONE_STAGE)[0] == 0


def test_a_requeued_job_whose_earlier_start_still_lives_asks_for_another_start(stopped, monkeypatch):
    """Slurm gives a node up that it cannot reach: what runs there may need minutes to find out."""
    (stopped.run_dir / "exit.json").unlink()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lock = RunLock(stopped.run_dir, job="7")
    assert lock.take() is None
    try:
        code, line = stopped.train(*ONE_STAGE)
    finally:
        lock.release()
    assert code == 75 and line.count("\n") == 1 and "job 7; wait for its end" in line
    assert not (stopped.run_dir / "exit.json").exists()


def test_keys_of_services_reach_no_file_and_no_line(site, monkeypatch):
    keys = {"WANDB_API_KEY": "5ec2e7" * 6 + "abcd", "HF_TOKEN": "hf_5ec2e7TokenThatNobodyMaySee"}
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    code, err = site.train(*ONE_STAGE, "log.wandb=true", "stages.ctx_32.tokens=256", "evaluation.tokens=0")
    assert code == 0, err
    for path in (path for path in site.root.rglob("*") if path.is_file()):
        assert not [name for name, key in keys.items() if key.encode() in path.read_bytes()], path
    assert not [name for name, key in keys.items() if key in site.out + err]
