"""Checkpoints in the background: what arrives on the disk, and that nothing else ever does."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from flash_case import SHAPES, Flying, check_content, disagree, is_gone, lose_a_writer, whole
from sbtrain.checkpoint import memory as host_memory
from sbtrain.checkpoint import writing
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.manifest import fault
from sbtrain.checkpoint.memory import SharedMemory, copy_into
from sbtrain.checkpoint.memory import place as place_all
from sbtrain.checkpoint.reading import read_state

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def parked():
    writers = []
    yield writers
    for memory, writer in writers:
        writer.close()
        memory.close()


@pytest.fixture
def flying(tmp_path, parked):
    made = Flying(tmp_path, parked)
    yield made
    made.park(parked)


def test_what_is_saved_is_the_state_at_that_step_whatever_happens_after(flying):
    flying.save(3)
    flying.held.set(4)
    flying.store.settle()
    folder = flying.folder / "checkpoints/step_3"
    assert Ledger(flying.folder).checkpoint == folder and flying.there() == ["step_3"]
    assert fault(folder) is None
    state = read_state(folder)
    assert (state["step"], state["tokens"], state["parts"]) == (3, 30, ["model", "optimizer"])
    check_content(folder, 3)
    metrics = flying.store.take_metrics()
    assert metrics["checkpoint_bytes"] == 6 * 96 * 33 + 4
    assert {"checkpoint_first_s", "checkpoint_blocked_s", "checkpoint_gb_per_s", "checkpoint_write_s"} <= set(metrics)
    assert flying.store.take_metrics() == {}


def test_the_memory_has_no_name_and_both_processes_end_with_the_store(tmp_path):
    before = _num_mapped()
    flying = Flying(tmp_path)
    flying.save(1)
    flying.store.settle()
    assert _num_mapped() == before + 1
    memory = flying.store.flash._memory.descriptor
    assert os.readlink(f"/proc/self/fd/{memory}").startswith("/memfd:"), "not in /dev/shm, which containers keep small"
    pid = flying.writer.pid
    flying.store.close()
    assert is_gone(pid) and not Path(f"/proc/self/fd/{memory}").exists()
    assert _num_mapped() == before


def _num_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:snapshots")


def test_while_it_writes_memory_snapshots_are_skipped_and_a_third_save_waits(flying):
    flying.save(1)
    flying.store.settle()
    flying.store.take_metrics()
    os.kill(flying.writer.pid, signal.SIGSTOP)
    flying.save(2)
    flying.snapshot(3)
    assert flying.store.take_metrics()["checkpoint_snapshots_skipped"] == 1
    flying.save(4)
    assert "checkpoint_wait_s" not in flying.store.take_metrics(), "there is a second slot"
    threading.Timer(0.3, os.kill, (flying.writer.pid, signal.SIGCONT)).start()
    flying.save(5)
    assert flying.store.take_metrics()["checkpoint_wait_s"] > 0.2
    flying.store.settle()
    assert flying.there() == ["step_1", "step_2", "step_4", "step_5"]
    for step in (2, 4, 5):
        check_content(flying.folder / f"checkpoints/step_{step}", step)


def test_a_snapshot_in_memory_is_persisted_without_another_copy(flying):
    flying.snapshot(2)
    assert not (flying.folder / "checkpoints").exists()
    flying.store.take_metrics()
    flying.save(2)
    flying.store.settle()
    assert "checkpoint_blocked_s" not in flying.store.take_metrics()
    check_content(flying.folder / "checkpoints/step_2", 2)


def test_a_snapshot_that_the_run_went_back_to_is_persisted_without_another_copy(flying):
    """The place in the data is another one by then."""
    flying.snapshot(2)
    flying.held.set(3)
    assert flying.store.restore_snapshot(flying.held, before=2) is None
    assert flying.store.restore_snapshot(flying.held, before=3).step == 2
    for name in flying.held.tensors:
        assert torch.equal(flying.held.tensors[name].view(SHAPES[name]), whole(name, 2))
    flying.store.take_metrics()
    flying.save(2, loader={"num_samples": 7})
    flying.store.flash.settle()
    assert "checkpoint_blocked_s" not in flying.store.take_metrics()
    check_content(flying.folder / "checkpoints/step_2", 2)
    assert read_state(flying.folder / "checkpoints/step_2")["loader"] == {"num_samples": 7}
    assert flying.store.restore_snapshot(flying.held, before=9) is None, "the checkpoint is as new"


def test_what_the_run_went_back_to_while_it_was_written_is_saved_with_its_new_place_in_the_data(flying):
    flying.save(2, loader={"num_samples": 5})
    flying.held.set(3)
    assert flying.store.restore_snapshot(flying.held, before=3).step == 2
    flying.save(2, loader={"num_samples": 7})
    assert read_state(flying.folder / "checkpoints/step_2")["loader"] == {"num_samples": 5}
    assert Ledger(flying.folder).rolled_back["loader"] == {"num_samples": 7}


def test_ranks_with_snapshots_of_different_steps_go_back_to_none(run_ranks, tmp_path):
    assert run_ranks(2, timeout_s=300)(disagree, str(tmp_path)) == [(None, 2), (None, 2)]


@pytest.mark.parametrize("moment", ["starting", "writing"])
def test_signals_to_the_process_group_do_not_reach_the_writer(flying, moment):
    if moment == "writing":
        flying.save(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(flying.writer.pid, number)
    pid = flying.writer.pid
    flying.save(2)
    flying.store.settle()
    assert flying.writer.pid == pid
    check_content(flying.folder / "checkpoints/step_2", 2)


def test_a_writer_that_dies_is_replaced(run_ranks, tmp_path):
    for there in run_ranks(2, timeout_s=300)(lose_a_writer, str(tmp_path)):
        assert there == ["step_1", "step_2"]
    assert Ledger(tmp_path).step == 2 and fault(tmp_path / "checkpoints/step_2") is None
    check_content(tmp_path / "checkpoints/step_2", 2)


def _check_intact(flying: Flying, ledger: bytes) -> None:
    assert flying.ledger.path.read_bytes() == ledger and flying.there() == ["step_1"]
    check_content(flying.folder / "checkpoints/step_1", 1)


def test_where_writers_die_again_and_again_the_run_ends(flying, monkeypatch, capfd):
    flying.save(1)
    flying.store.settle()
    ledger = flying.ledger.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_CODE", "import sys; sys.exit(1)")
        os.kill(flying.writer.pid, signal.SIGKILL)
        flying.save(2)
        with pytest.raises(ValueError, match=r"step_2\.\w+\.partial: rank 0: its writer process ended; the previous"):
            flying.store.settle()
    assert "warning: step 2: the writer process of rank 0 ended" in capfd.readouterr().out
    _check_intact(flying, ledger)


def test_a_disk_that_fills_up_while_writing_costs_nothing_but_this_checkpoint(flying):
    """The largest size of a file stands for the disk; the writer has it from the process that starts it."""
    flying.save(1)
    flying.store.settle()
    ledger = flying.ledger.path.read_bytes()
    before = resource.prlimit(flying.writer.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(flying.writer.pid, resource.RLIMIT_FSIZE, (4096, before[1]))
    flying.save(2)
    with pytest.raises(ValueError) as caught:
        flying.store.settle()
    text = str(caught.value)
    assert "\n" not in text and ".partial: rank 0: " in text and "step_2." in text and "File too large" in text
    assert "the previous checkpoint is intact, free some space" in text
    _check_intact(flying, ledger)


def test_a_folder_that_cannot_be_finished_is_no_checkpoint(flying):
    flying.save(1)
    flying.store.flash.settle()
    ledger = flying.ledger.path.read_bytes()
    (flying.store._partials.of(2) / "state.json").mkdir(parents=True)
    flying.save(2)
    with pytest.raises(ValueError, match=r"step_2\.\w+\.partial: rank 0: state\.json.*Is a directory; the previous"):
        flying.store.settle()
    _check_intact(flying, ledger)


@pytest.mark.parametrize("problem", ["no space left in x", "run_dir=x was taken over"])
def test_what_may_not_be_written_is_refused_before_anything_is(flying, monkeypatch, problem):
    flying.save(1)
    flying.store.settle()
    ledger = flying.ledger.path.read_bytes()

    def taken_over():
        raise ValueError(problem)

    if "space" in problem:
        monkeypatch.setattr("sbtrain.checkpoint.store._shortage", lambda *args: problem)
    else:
        flying.store.check_lock = taken_over
    with pytest.raises(ValueError, match=f"^{problem}$"):
        flying.save(2)
    _check_intact(flying, ledger)


def _many_files(folder: Path) -> None:
    """So that it takes a moment to delete."""
    for number in range(2000):
        (folder / f"{number}").touch()


def test_a_disk_too_full_for_the_next_one_spares_the_one_being_written(flying, monkeypatch):
    flying.save(1)
    flying.store.settle()
    os.kill(flying.writer.pid, signal.SIGSTOP)
    flying.save(2)
    monkeypatch.setattr("sbtrain.checkpoint.store._shortage", lambda *args: "no space left in x")
    threading.Timer(0.2, os.kill, (flying.writer.pid, signal.SIGCONT)).start()
    with pytest.raises(ValueError, match="^no space left in x$"):
        flying.save(3)
        flying.store.settle()
    assert Ledger(flying.folder).step == 2 and flying.there() == ["step_1", "step_2"]
    check_content(flying.folder / "checkpoints/step_2", 2)


@pytest.mark.parametrize("queued", [True, False])
def test_room_that_a_delete_under_way_makes_is_waited_for(flying, monkeypatch, queued):
    """The disk holds two checkpoints."""
    flying.store.keep_last = 1
    flying.save(1)
    flying.store.settle()
    _many_files(flying.folder / "checkpoints/step_1")

    def shortage(folder, *args):
        return "no space left" if list(folder.glob("step_1*")) else None

    os.kill(flying.writer.pid, signal.SIGSTOP)
    flying.save(2)
    monkeypatch.setattr("sbtrain.checkpoint.store._shortage", shortage)
    threading.Timer(0.2, os.kill, (flying.writer.pid, signal.SIGCONT)).start()
    if not queued:
        flying.store.flash.settle()
    flying.save(3)
    flying.store.flash.settle()
    assert Ledger(flying.folder).step == 3
    check_content(flying.folder / "checkpoints/step_3", 3)


def _taken_over() -> None:
    raise ValueError("run_dir=x was taken over")


def test_a_lock_that_is_lost_while_it_writes_ends_the_run_before_the_folder_gets_its_name(flying):
    flying.save(1)
    flying.store.settle()
    ledger = flying.ledger.path.read_bytes()
    os.kill(flying.writer.pid, signal.SIGSTOP)
    flying.save(2)
    flying.store.check_lock = _taken_over
    os.kill(flying.writer.pid, signal.SIGCONT)
    with pytest.raises(ValueError, match="^run_dir=x was taken over$"):
        flying.store.settle()
    time.sleep(0.2)  # nothing was sent that the writer might still do
    assert flying.ledger.path.read_bytes() == ledger and not (flying.folder / "checkpoints/step_2").exists()


def test_two_jobs_never_write_into_the_same_folder(flying, parked):
    flying.save(1)
    flying.store.settle()
    os.kill(flying.writer.pid, signal.SIGSTOP)
    flying.save(2)
    (flying.folder / "checkpoints/step_9.dead.partial").mkdir()
    other = Flying(flying.folder, parked)
    other.save(2)
    other.store.settle()
    assert other.there() == ["step_1", "step_2"], "what a dead start has left is gone"
    inode = (flying.folder / "checkpoints/step_2").stat().st_ino
    flying.store.check_lock = _taken_over
    os.kill(flying.writer.pid, signal.SIGCONT)
    with pytest.raises(ValueError):
        flying.store.settle()
    assert other.store._partials.of(2) != flying.store._partials.of(2)
    assert (flying.folder / "checkpoints/step_2").stat().st_ino == inode
    check_content(flying.folder / "checkpoints/step_2", 2)
    other.park(parked)


def test_memory_that_is_not_there_is_refused_in_one_line(tmp_path, monkeypatch):
    flying = Flying(tmp_path)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 1000)
    with pytest.raises(ValueError) as caught:
        flying.save(1)
    flying.store.close()
    text = str(caught.value)
    assert "\n" not in text and "checkpoint.asynchronous=true needs 0.0 GB of memory on host" in text
    assert "set checkpoint.asynchronous=false" in text


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from flash_case import SHAPES, Flying
SHAPES["weight"] = (4096, 4096)
flying = Flying(Path(sys.argv[1]))
flying.save(1)
flying.store.settle()
print(flying.writer.pid, flush=True)
flying.save(2)
while not list(flying.folder.glob("checkpoints/step_2.*.partial/*")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_training_process_that_is_killed_takes_its_writer_with_it(tmp_path, parked):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(HERE.parents[1]), str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert is_gone(int(done.stdout.split()[-1]))
    time.sleep(0.2)
    assert Ledger(tmp_path).step == 1 and not (tmp_path / "checkpoints/step_2").exists()
    again = Flying(tmp_path, parked)
    again.save(2)
    again.store.settle()
    assert again.there() == ["step_1", "step_2"]
    again.park(parked)


def _check_copies(place: str) -> SharedMemory:
    memory = SharedMemory()
    sources = [torch.rand(1000), torch.rand(7).bfloat16(), torch.randint(256, (5,), dtype=torch.uint8)]
    sources = [source.to(place) for source in sources]
    starts, num_bytes = place_all([source.numel() * source.element_size() for source in sources])
    assert starts == [0, 4096, 8192] and num_bytes == 12288
    memory.reserve(num_bytes, pin=place == "cuda")
    assert copy_into(memory.bytes, sources, starts) == 4019
    for source, start in zip(sources, starts):
        there = memory.bytes[start : start + source.numel() * source.element_size()].view(source.dtype)
        assert torch.equal(there, source.cpu())
    return memory


def test_tensors_on_the_cpu_are_copied_as_they_are():
    _check_copies("cpu").close()


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_copied_to_pinned_memory():
    memory = _check_copies("cuda")
    assert memory.bytes.is_pinned()
    memory.close()


def test_memory_grows_and_keeps_its_descriptor():
    memory = SharedMemory()
    descriptor = memory.descriptor
    memory.reserve(4096, pin=False)
    memory.reserve(100, pin=False)
    assert memory.size == 4096
    memory.reserve(1 << 20, pin=False)
    assert memory.size == os.fstat(descriptor).st_size == 1 << 20
    memory.close()
    memory.close()
