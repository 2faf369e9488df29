"""Where a run goes on: what is damaged is skipped with a line, and a lost ledger is made again."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.checkpoint import recover as recover_module
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.manifest import fault
from sbtrain.checkpoint.recover import Recovered, newest, recover, step_folders
from sealed import TENSORS, edit, write_checkpoint

STAGES = {"a": 100, "b": 100, "c": 100}
OLD = {"stages_done": ["a"], "checkpoint": "checkpoints/step_6", "step": 6}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    with Mesh.build(Layout()):
        yield


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run in its second stage: step 2 within the first, step 4 at its end, step 6 in the second."""
    for step, stage, stage_tokens in ((2, "a", 50), (4, "a", 100), (6, "b", 50)):
        write_checkpoint(tmp_path, step, stage=stage, stage_tokens=stage_tokens)
    (tmp_path / "ledger.json").write_text(json.dumps(OLD))
    return tmp_path


def spoil(run_dir: Path, *steps: int) -> None:
    for step in steps:
        (run_dir / f"checkpoints/step_{step}" / TENSORS).write_bytes(b"half")


def settled(found: Recovered) -> dict:
    found.settle()
    return json.loads(found.ledger.path.read_text())


def test_a_whole_run_is_left_alone(run_dir, capsys):
    write_checkpoint(run_dir, 8, stage="b")  # beyond the ledger's: the run was taken back
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    found = recover(run_dir, STAGES)
    assert found.ledger.value == OLD and found.lines == found.damaged == []
    found.settle()
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert capsys.readouterr().out == ""


def test_a_new_run(tmp_path):
    (tmp_path / "checkpoints/step_3.partial").mkdir(parents=True)
    for run_dir in (tmp_path, tmp_path / "none"):
        found = recover(run_dir, STAGES)
        assert found.ledger.checkpoint is None and found.lines == []
        assert newest(run_dir) is None


@pytest.mark.parametrize(
    ("steps", "left", "done"), [((6,), 4, ["a"]), ((6, 4), 2, [])], ids=["end of a stage", "within a stage"]
)
def test_damaged_ones_are_skipped_and_stages_that_are_not_done_then_are_done_again(run_dir, capsys, steps, left, done):
    spoil(run_dir, *steps)
    found = recover(run_dir, STAGES)
    expected = {"stages_done": done, "checkpoint": f"checkpoints/step_{left}", "step": left}
    assert found.ledger.value == expected and json.loads((run_dir / "ledger.json").read_text()) == OLD
    assert settled(found) == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"skipped {run_dir}/checkpoints/step_{step}: {TENSORS} has 4 bytes, not the 1000 that manifest.json says"
        for step in steps
    ]
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"step_2", *(["step_4"] if left == 4 else []), *(f"step_{step}.damaged" for step in steps)}
    again = recover(run_dir, STAGES)
    assert again.ledger.value == expected and again.lines == [], "said once"


def test_one_that_is_gone_is_skipped(run_dir):
    shutil.rmtree(run_dir / "checkpoints/step_6")
    found = recover(run_dir, STAGES)
    assert found.ledger.step == 4 and found.lines == [f"skipped {run_dir}/checkpoints/step_6: it is gone"]
    assert settled(found)["stages_done"] == ["a"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "ledger.json is missing"),
        (b"", "ledger.json is not valid JSON"),
        (b"{}", "ledger.json lacks"),
        (b"[1]", "ledger.json lacks"),
        (json.dumps({**OLD, "checkpoint": "../other/step_9"}).encode(), "ledger.json names '../other/step_9', which"),
        (json.dumps({**OLD, "checkpoint": 6}).encode(), "ledger.json names 6, which"),
        (json.dumps({**OLD, "stages_done": "a"}).encode(), "stages_done is no list"),
    ],
)
@pytest.mark.parametrize("spoiled", [False, True])
def test_a_lost_ledger_is_made_again_from_checkpoints_that_verify(run_dir, content, says, spoiled):
    path = run_dir / "ledger.json"
    path.unlink() if content is None else path.write_bytes(content)
    if spoiled:
        spoil(run_dir, 6)
    found, step = recover(run_dir, STAGES), 4 if spoiled else 6
    assert says in found.lines[0] and found.lines[-1] == f"it is made again from checkpoints/step_{step}"
    # the end of stage a may still have to be judged, so it is not called done
    expected = {"stages_done": [] if spoiled else ["a"], "checkpoint": f"checkpoints/step_{step}", "step": step}
    assert settled(found) == expected and Ledger(run_dir).value == expected


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(run_dir):
    spoil(run_dir, 2, 4, 6)
    with pytest.raises(ValueError) as caught:
        recover(run_dir, STAGES)
    text = str(caught.value)
    assert text.startswith(f"no checkpoint of {run_dir} can be used (") and "\n" not in text
    assert all(f"step_{step}: " in text for step in (2, 4, 6)) and "choose another run_dir to begin again" in text
    (run_dir / "ledger.json").unlink()
    with pytest.raises(ValueError, match=r"can be used \(.*ledger\.json is missing"):
        recover(run_dir, STAGES)


def test_one_of_another_version_is_refused_not_skipped(run_dir):
    """Going back for days because of a wrong version of the program would be a bad surprise."""
    spoil(run_dir, 6)
    shutil.rmtree(run_dir / "checkpoints/step_4")
    write_checkpoint(run_dir, 4, format=2)
    with pytest.raises(ValueError, match="checkpoint format 2 is not 1; load it with"):
        recover(run_dir, STAGES)


def test_readers_get_the_newest_that_is_whole(run_dir):
    assert newest(run_dir).name == "step_6"
    spoil(run_dir, 6)
    assert newest(run_dir).name == "step_4"
    (run_dir / "ledger.json").write_text("{")
    assert newest(run_dir).name == "step_4"
    spoil(run_dir, 2, 4)
    with pytest.raises(ValueError, match="has no checkpoint that is whole .*step_4: .*step_2: .*copy one back"):
        newest(run_dir)


@pytest.mark.parametrize(
    ("stages_done", "step", "done"),
    [(["a"], 2, []), (["a"], 4, ["a"]), (["a", "b"], 4, ["a"]), ([], 6, ["a"]), ([], 4, []), (["b"], 6, ["a"])],
)
def test_stages_that_the_checkpoint_does_not_confirm_are_done_again(run_dir, capsys, stages_done, step, done):
    """Who goes back by hand writes another name into the ledger, and nothing else."""
    edit(run_dir / "ledger.json", stages_done=stages_done, checkpoint=f"checkpoints/step_{step}")
    found = recover(run_dir, STAGES)
    assert found.ledger.stages_done == done and found.ledger.step == step and found.damaged == []
    if stages_done != done:
        assert settled(found)["stages_done"] == done
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{run_dir}/checkpoints/step_{step} is of stage ")
    assert recover(run_dir, STAGES).lines == []


def test_only_numbers_are_steps(tmp_path):
    for name in ("step_3", "step_12", "step_x", "step_4.partial", "step_5.damaged", "step_", "stop_6"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/step_7").write_text("a file")
    assert step_folders(tmp_path) == [12, 3]


@dataclass
class Lagging:
    """What is wrong with a checkpoint as a host sees it whose file system shows it that many looks late."""

    num_looks: int

    def __call__(self, folder: Path, **how) -> str | None:
        self.num_looks -= 1
        return "it is gone" if self.num_looks >= 0 else fault(folder, **how)


def _recover(rank: int, run_dir: Path, late: tuple[int, int] = (-1, 0), wait_s: float = 0.5) -> tuple:
    """late: a rank, and how many looks late its file system shows a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover_module, "fault", Lagging(late[1]) if rank == late[0] else fault)
        patch.setattr(recover_module, "LAG_S", wait_s)
        patch.setattr(recover_module, "LOOK_S", 0.01)
        found = recover(run_dir, STAGES)
    return found.ledger.value, found.lines


def test_all_ranks_agree_whoever_reads_the_damaged_file(run_dir, run_ranks):
    content = bytearray((run_dir / f"checkpoints/step_6/{TENSORS}").read_bytes())
    content[500] ^= 1
    (run_dir / f"checkpoints/step_6/{TENSORS}").write_bytes(content)
    results = run_ranks(2)(_recover, run_dir)
    assert results[0] == results[1] and results[0][0]["step"] == 4
    edit(run_dir / "ledger.json", checkpoint="checkpoints/step_2", step=2)
    assert [value["step"] for value, _ in run_ranks(2)(_recover, run_dir)] == [2, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_sees_a_checkpoint_later_than_another_does_not_condemn_it(run_dir, run_ranks, rank):
    for value, lines in run_ranks(2)(_recover, run_dir, (rank, 3), 60.0):
        assert value["step"] == 6 and lines == []
    with pytest.raises(ValueError, match=rf"^rank {rank} \(host .*\) does not see .*step_6 as others do: it is gone; "):
        run_ranks(2)(_recover, run_dir, (rank, 10**6))


def _recover_badly(rank: int, run_dir: Path, bad: int, call: str, number: int) -> tuple:
    """recover, where one rank cannot read what it opens or reads in step_6."""
    with pytest.MonkeyPatch.context() as patch:
        before = getattr(os, call)

        def fail(place, *args, **kwargs):
            if call == "pread" or "step_6/" in str(place):
                raise OSError(number, os.strerror(number), *([] if call == "pread" else [str(place)]))
            return before(place, *args, **kwargs)

        if rank == bad:
            patch.setattr(os, call, fail)
        return _recover(rank, run_dir)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(("call", "number"), [("pread", errno.EIO), ("open", errno.EACCES), ("lstat", errno.ESTALE)])
def test_a_host_that_cannot_read_condemns_nothing(run_dir, run_ranks, bad, call, number):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(ValueError) as caught:
        run_ranks(2)(_recover_badly, run_dir, bad, call, number)
    line = str(caught.value)
    says = (
        rf"^rank {bad}: host {platform.node()} cannot read {run_dir}/checkpoints/step_6/\S+ \({os.strerror(number)}\), "
    )
    assert re.match(says, line) and "\n" not in line
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


def test_readers_get_no_older_one_where_they_cannot_read(run_dir, monkeypatch):
    def fail(place, *args, **kwargs):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(place))

    monkeypatch.setattr(os, "lstat", fail)
    with pytest.raises(ValueError, match="cannot read .*step_6/manifest.json "):
        newest(run_dir)


def test_checkpoints_that_cannot_be_listed_are_not_none(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()

    def fail(place, *args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(place))

    monkeypatch.setattr(os, "listdir", fail)
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(ValueError, match="Input/output error"):
        recover(tmp_path, STAGES)
