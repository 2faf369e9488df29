"""The store: a checkpoint is whole or it is not there, and whatever fails, the one before it stays the newest."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flash_case import Held
from parallel.engine import Weights
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.place import Kind, here
from sbtrain.checkpoint import manifest
from sbtrain.checkpoint.ledger import Ledger, empty
from sbtrain.checkpoint.manifest import fault
from sbtrain.checkpoint.reading import read_state
from sbtrain.checkpoint.share import Share
from sbtrain.checkpoint.state import RunState
from sbtrain.convert.reader import CheckpointReader
from sbtrain.model.build import global_parameters
from store_case import Saved

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def saved(tmp_path):
    with Mesh.build(Layout()) as mesh:
        yield Saved(tmp_path, mesh)


def test_a_checkpoint_holds_every_tensor_and_where_the_run_stands(saved):
    folder = saved.save(3)
    reader = CheckpointReader(folder)
    for name, parameter in global_parameters(saved.model).items():
        assert torch.equal(reader.get(name), parameter), name
    state = read_state(folder)
    assert state["format"] == 1 and state["parts"] == ["model"] and state["op_table"] == {"hash": "0123"}
    assert fault(folder) is None
    assert (state["stage"], state["step"], state["tokens"], state["loader"]) == ("a", 3, 30, None)
    assert Ledger(saved.folder).checkpoint == folder and Ledger(saved.folder).step == 3


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(0, ["step_10", "step_2", "step_9"]), (2, ["step_10", "step_9"]), (1, ["step_10"])]
)
def test_only_the_last_ones_stay_and_leftovers_go(saved, keep_last, kept):
    saved.store.keep_last = keep_last
    saved.save(2)
    (saved.folder / "checkpoints/step_7.partial").mkdir()
    saved.save(9), saved.save(10)
    assert saved.there() == kept, "by number, not by name"


def test_multiples_of_keep_every_steps_stay_for_good(saved):
    saved.store.keep_last, saved.store.keep_every_steps = 1, 4
    for step in (0, 2, 4, 6, 8, 10):
        saved.save(step)
    assert saved.there() == ["step_10", "step_4", "step_8"]


def test_what_was_found_damaged_goes_when_there_is_a_newer_one(saved):
    saved.save(3)
    (saved.folder / "checkpoints/step_4.damaged").mkdir()
    saved.save(4)
    assert saved.there() == ["step_3", "step_4"]


def _check_intact(saved: Saved, folder: Path, ledger: bytes) -> None:
    assert saved.ledger.path.read_bytes() == ledger
    assert saved.there() == [folder.name] and Ledger(saved.folder).checkpoint == folder
    assert (CheckpointReader(folder).get("decoder.final_layernorm.weight") == 3).all()


def test_no_space_left_is_noticed_before_anything_is_written(saved, monkeypatch):
    folder = saved.save(3)
    ledger = saved.ledger.path.read_bytes()
    needed = Share.of(Weights(saved.model, saved.mesh)).total_bytes
    assert needed >= sum(parameter.numel() * 4 for parameter in saved.model.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, needed - 1))
        with pytest.raises(ValueError, match=r"no space left in .*checkpoints: .* free some space and start the same"):
            saved.save(4)
        _check_intact(saved, folder, ledger)
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, needed))
        saved.save(4)
    assert Ledger(saved.folder).step == 4


def test_a_disk_that_fills_up_while_writing_costs_nothing_but_this_checkpoint(saved):
    """The largest size of a file stands for the disk."""
    folder = saved.save(3)
    ledger = saved.ledger.path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, before[1]))
    try:
        with pytest.raises(ValueError) as caught:
            saved.save(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(caught.value)
    assert "\n" not in text and ".partial: rank 0: __0_0.distcp: File too large; the previous" in text
    assert "the previous checkpoint is intact, free some space" in text
    _check_intact(saved, folder, ledger)  # what was written of the new one is gone, and so is what filled the disk
    saved.save(4)
    assert saved.there() == ["step_3", "step_4"]


@contextmanager
def _full_disk() -> Iterator[None]:
    """The largest size of a file stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _full_memory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Share, "read", lambda self, item: torch.empty(1 << 60, dtype=torch.uint8))
        yield


def _save_with_one_full(rank: int, folder: Path, bad: int, full: Callable) -> tuple[str, bool]:
    """Save step 3, and step 4 where one rank has no room; what this rank says, and whether step 5 can be saved."""
    with Mesh.build(Layout(pp=2)) as mesh:
        saved = Saved(folder, mesh)
        saved.save(3)
        with full() if rank == bad else nullcontext(), pytest.raises(ValueError) as caught:
            saved.save(4)
        dist.barrier()  # rank 0 has deleted what was written
        intact = (
            saved.there() == ["step_3"] and Ledger(folder).step == 3 and fault(folder / "checkpoints/step_3") is None
        )
        dist.barrier()
        saved.save(5)
        return str(caught.value), intact


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("full", [_full_disk, _full_memory])
def test_a_disk_or_a_memory_that_is_full_for_one_rank_is_said_by_all(tmp_path, run_ranks, bad, full):
    (first, intact), (second, also) = run_ranks(2)(_save_with_one_full, tmp_path, bad, full)
    disk = full is _full_disk
    reason = f"__{bad}_0.distcp: File too large; " if disk else "no memory for a copy of a tensor ("
    assert "\n" not in first and f".partial: rank {bad}: {reason}" in first
    lacks = "space" if disk else "memory"
    assert first.endswith(f"the previous checkpoint is intact, free some {lacks} and start the same command again")
    assert second == first
    assert intact and also and Ledger(tmp_path).step == 5


def _save_apart(rank: int, folder: Path) -> tuple[str, dict, list[str]]:
    """Save where every host has a run directory of its own; what this rank says, its ledger, its checkpoints."""
    with Mesh.build(Layout(pp=2)) as mesh, pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "LAG_S", 0.2)
        saved = Saved(folder / str(rank), mesh)
        with pytest.raises(ValueError) as caught:
            saved.save(3)
        return str(caught.value), Ledger(saved.folder).value, [path.name for path in saved.folder.glob("*/step_3")]


def test_hosts_that_do_not_share_the_run_directory_are_told_before_anything_counts_on_it(tmp_path, run_ranks):
    (first, *nothing), (second, *also) = run_ranks(2)(_save_apart, tmp_path)
    assert ".partial: __1_0.distcp: host " in first and " does not see it, " in first and "\n" not in first
    assert "run_dir must be one folder that all hosts share" in first and "free some space" not in first
    assert "__1_0.distcp: host " in second
    assert nothing == also == [empty(), []]


@pytest.mark.parametrize("whole", [False, True])
def test_the_others_are_as_patient_with_the_index_as_with_the_writing(saved, monkeypatch, whole):
    places, of = [], Share.of
    monkeypatch.setattr(Share, "of", lambda weights: places.append(here.at) or of(weights))
    if whole:
        saved.store.save(Held(), RunState(stage="a", step=3))
    else:
        saved.save(3)
    assert [(at.name, at.kind) for at in places] == [("checkpoint save", Kind.patient)]


@pytest.mark.parametrize(
    "name", ["__0_0.distcp", "common.pt", "state.json", ".metadata", "manifest.json", "ledger.json"]
)
def test_a_disk_that_is_full_at_one_file(saved, monkeypatch, name):
    """It is noticed where a file is to be on the disk; such an error names no file."""
    folder = saved.save(3)
    ledger, fsync = saved.ledger.path.read_bytes(), os.fsync

    def full(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(ValueError) as caught:
        patch.setattr(os, "fsync", full)
        saved.save(4)
    text = str(caught.value)
    assert (
        name in text and "No space left on device" in text and "\n" not in text and text.count("free some space") == 1
    )
    assert saved.ledger.path.read_bytes() == ledger and fault(folder) is None
    assert Ledger(saved.folder).checkpoint == folder
    again = Saved(saved.folder, saved.mesh)
    again.save(4)
    assert again.there() == ["step_3", "step_4"] and Ledger(saved.folder).step == 4


def test_a_job_that_lost_its_run_directory_saves_nothing(saved):
    folder = saved.save(3)
    ledger = saved.ledger.path.read_bytes()

    def taken():
        raise ValueError("run_dir=x was taken over")

    saved.store.check_lock = taken
    with pytest.raises(ValueError, match="^run_dir=x was taken over$"):
        saved.save(4)
    _check_intact(saved, folder, ledger)


@pytest.mark.parametrize("moment", ["rename", "ledger"])
def test_killed_while_saving_the_run_goes_on_from_the_one_before(saved, monkeypatch, moment):
    folder = saved.save(3)

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "rename":
            patch.setattr(Path, "rename", kill)
        else:
            patch.setattr(Ledger, "record_checkpoint", kill)
        saved.save(4)
    assert Ledger(saved.folder).checkpoint == folder and read_state(folder)["step"] == 3
    again = Saved(saved.folder, saved.mesh)
    again.save(4)
    assert again.there() == ["step_3", "step_4"] and Ledger(saved.folder).step == 4


@pytest.mark.parametrize("missing", ["state.json", ".metadata"])
def test_an_incomplete_checkpoint_is_refused_by_name(saved, missing):
    folder = saved.save(3)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=r"step_3 is not a complete checkpoint .*point ledger\.json at an earlier"):
        read_state(folder)


@pytest.mark.parametrize("form", [2, None, "1"])
def test_another_format_is_refused_by_name(saved, form):
    folder = saved.save(3)
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**content, "format": form}))
    with pytest.raises(ValueError, match=rf"state\.json: checkpoint format {form!r} is not 1; load it with"):
        read_state(folder)


def test_what_a_run_has_left_is_no_checkpoint_to_fall_back_to(saved):
    """Taken back from step 3 to step 1: with step 4 both steps between are gone, and push out nothing."""
    for step in (1, 2, 3):
        saved.save(step)
    kept = saved.there()
    back = int(kept[0].removeprefix("step_"))
    saved.ledger.record_checkpoint(f"checkpoints/step_{back}", back, write=True)
    saved.save(4)
    assert saved.there() == [f"step_{back}", "step_4"] and len(kept) > 1
