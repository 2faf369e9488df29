"""The checkpoint store: saves and loads the sharded state of an engine, in megatron's distributed format.

A checkpoint is written under checkpoints/step_N.START.partial, gets a manifest of its files when all are on the disk,
and is renamed; the ledger calls it newest only then. Any layout can load what another has written. state.json beside
the tensors holds the RunState and the op table.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from parallel import mcore
from parallel.collectives import together
from parallel.engine import Engine, Weights, sharded_weights
from parallel.mesh import Mesh
from parallel.optimizer import saved_step_count
from parallel.place import primitive, section
from parallel.safe_load import read_common
from sbtrain.checkpoint.fill import fill
from sbtrain.checkpoint.flash import Flash
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.manifest import delete, drop, seal
from sbtrain.checkpoint.partials import NO_MEMORY, Partials, not_written
from sbtrain.checkpoint.reading import FORMAT, lacks_memory, read_state, readable, reason_of
from sbtrain.checkpoint.share import Share, bytes_of
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.tensor_files import Written, write_files, write_rest

_PARTS = ("model", "optimizer")
"""What a checkpoint of training holds; that of a conversion has the model alone."""


class Store:
    """checkpoints/ of one run directory."""

    def __init__(
        self,
        run_dir: Path,
        ledger: Ledger,
        *,
        keep_last: int,
        op_table: dict,
        keep_every_steps: int = 0,
        check_lock: Callable[[], None] = lambda: None,
        asynchronous: bool = False,
    ):
        """keep_last: how many step folders stay (0 keeps all). keep_every_steps: its multiples stay besides (0: none).

        op_table: the ops in use and their hash, saved along. check_lock(): raises ValueError where rank 0 may not
        write to the run directory any more. asynchronous: save() goes on as soon as the state is in host memory; close
        the store after use.
        """
        self.folder, self.ledger = run_dir / "checkpoints", ledger
        self.keep_last, self.keep_every_steps, self.op_table = keep_last, keep_every_steps, op_table
        self.check_lock = check_lock
        self._partials = Partials(self.folder)
        self._share: Share | None = None
        self.flash = self.in_background() if asynchronous else None

    def in_background(self, **parts) -> Flash:
        """What saves behind training's back. parts: memory and writer, where they are there already."""
        return Flash(
            self.folder,
            self._partials,
            content=self._content,
            sealed=self._sealed,
            check_lock=lambda: self.check_lock(),
            check_room=self._check_room,
            **parts,
        )

    def save(self, engine: Engine, state: RunState) -> None:
        """Save under step_N and make it the newest, in the background where the store is asynchronous. Collective.

        Raises ValueError when the disk cannot hold it; what was saved before stays as it is. A run that has gone back
        to the newest checkpoint has its tensors already: what else the state says is kept in the ledger.
        """
        if self.flash is not None and self.flash.is_writing(state.step):
            self.flash.settle()
        if self.ledger.step == state.step and self.ledger.checkpoint is not None:
            self._keep_rollback(state)
            return
        if self.flash is not None:
            self.flash.take(engine, state, persist=True)
        else:
            with section("checkpoint save", patient=True):
                self._write(self._share_of(engine), state, _PARTS)

    def _keep_rollback(self, state: RunState) -> None:
        there = together(lambda: RunState.from_json(read_state(self.ledger.checkpoint)))
        if state.loader is not None and (state.loader, state.watch) != (there.loader, there.watch):
            _first(self.check_lock)
            _first(lambda: self.ledger.record_rollback(state.to_json(), write=True))
            self.ledger.record_rollback(state.to_json(), write=False)

    def snapshot(self, engine: Engine, state: RunState) -> None:
        """Keep the state in host memory alone, where the store is asynchronous. Collective."""
        if self.flash is not None:
            self.flash.take(engine, state, persist=False)

    def settle(self) -> None:
        """Wait until all that was saved is on the disk; the engine may be closed then. Collective."""
        self._share = None
        if self.flash is not None:
            self.flash.settle()
            self.flash.forget()

    def take_metrics(self) -> dict:
        """What metrics.jsonl says of the saves since the last call; empty where there was none."""
        return {} if self.flash is None else self.flash.take_metrics()

    def close(self) -> None:
        """End the writer process, if there is one. What it has not finished is no checkpoint."""
        self._share = None
        if self.flash is not None:
            self.flash.close()

    def save_weights(self, model, mesh: Mesh, state: RunState) -> None:
        """The same for weights without an optimizer: what a conversion leaves for training to start from.

        model: a stage or the list of its chunks.
        """
        with section("checkpoint save", patient=True):
            self._write(Share.of(Weights(model, mesh)), state, ("model",))

    def _share_of(self, engine: Engine) -> Share:
        """How this rank's part of the engine is saved, which is found out once. Collective."""
        if self._share is None or self._share.engine is not engine:
            self._share = Share.of(engine)
        return self._share

    def _write(self, share: Share, state: RunState, parts: tuple[str, ...]) -> None:
        self._partials.open()
        final, partial = self.folder / f"step_{state.step}", self._partials.of(state.step)
        _first(self.check_lock)
        self._make_room(partial, share.total_bytes)
        with _intact(partial):
            written = together(lambda: _written(partial, share))
            entries = self._finished(partial, share, written, self._content(state, parts))
        _first(self.check_lock)
        with _intact(partial):
            _first(lambda: seal(partial, final, entries))
        old = self._sealed(state.step)
        _first(lambda: drop(old))

    def _finished(self, partial: Path, share: Share, written: Written, content: dict) -> dict[str, dict]:
        """Rank 0 adds what is beside the tensors; what the manifest says of all files, on rank 0. Collective."""
        gathered, entries = [None] * dist.get_world_size(), {}
        with primitive("places in a checkpoint"):
            dist.gather_object(written, gathered if dist.get_rank() == 0 else None)
        common = bytes_of(share.engine.common_state())
        small = {"state.json": content, "common.pt": common, "metadata.json": mcore.CHECKPOINT_FORMAT}
        _first(lambda: entries.update(write_rest(partial, small, share.metadata, gathered)))
        return entries

    def _content(self, state: RunState, parts: tuple[str, ...] = _PARTS) -> dict:
        """Of state.json."""
        return {"format": FORMAT, "parts": list(parts), "op_table": self.op_table, **state.to_json()}

    def _sealed(self, step: int) -> list[Path]:
        """Call the checkpoint of that step the newest; folders that may go then, on rank 0. Collective."""
        name = f"checkpoints/step_{step}"
        before = self.ledger.step if self.ledger.checkpoint is not None else -1
        _first(self.check_lock)
        _first(lambda: self.ledger.record_checkpoint(name, step, write=True))
        self.ledger.record_checkpoint(name, step, write=False)
        return [] if dist.get_rank() else self._old(before)

    def _check_room(self, needed_bytes: int) -> None:
        """Raise ValueError or OSError where the disk does not take so much."""
        self.folder.mkdir(parents=True, exist_ok=True)
        problem = _shortage(self.folder, needed_bytes, shutil.disk_usage(self.folder).free)
        if problem:
            raise ValueError(problem)

    def restore(self, engine: Engine) -> RunState | None:
        """Load the newest checkpoint into the engine, or return None if there is none. Collective.

        Raises ValueError naming the checkpoint when it is damaged or of another format.
        """
        self.settle()
        folder = self.ledger.checkpoint
        if folder is None:
            return None
        content = together(lambda: read_state(folder))
        with section("checkpoint load", patient=True):
            if content["parts"] == ["model"]:
                self._load_weights(engine, folder)
            else:
                self._load(engine, folder)
        return RunState.from_json(self.ledger.rolled_back or content)

    def restore_snapshot(
        self, engine: Engine, *, before: int, wanted: Callable[[RunState], bool] = lambda state: True
    ) -> RunState | None:
        """Put the engine back to its newest snapshot in memory, if it is newer than the newest checkpoint. Collective.

        before: the step that the run leaves. wanted(state): whether to, asked of all ranks. None, and nothing is
        changed, where there is no such snapshot.
        """
        if self.flash is None:
            return None
        after = -1 if self.ledger.checkpoint is None else self.ledger.step
        with section("snapshot load", patient=True):
            return self.flash.restore(engine, after=after, before=before, wanted=wanted)

    def _load(self, engine: Engine, folder: Path) -> None:
        """Weights and optimizer: each rank reads what it holds of them."""
        pieces, _ = engine.own_state()

        def read() -> int:
            with readable(folder):
                fill(folder, pieces)
                return saved_step_count(read_common(folder))

        engine.adopt(together(read))

    def _load_weights(self, engine: Engine, folder: Path) -> None:
        """Weights alone, with megatron's loader: each rank reads all that it holds."""
        sharded = {"model": sharded_weights(engine.models, engine.mesh)}
        with readable(folder):
            loaded = mcore.dist_checkpointing.load(sharded, str(folder), validate_access_integrity=False)
        engine.load_weights(loaded["model"])

    def _make_room(self, partial: Path, needed_bytes: int) -> None:
        """needed_bytes: of all ranks, on rank 0."""
        problem = [None]
        if dist.get_rank() == 0:
            self._partials.clear()
            problem = [_cannot_hold(partial, needed_bytes)]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise ValueError(problem[0])

    def _old(self, before: int) -> list[Path]:
        """Checkpoints that need not be kept, and what is left of others. before: the step of the newest until now.

        A run that was taken back to an earlier step has left what lies between that and its new checkpoint.

        What lies beyond the ledger's checkpoint stays: the run may have been taken back to an earlier one, and ranks
        may have begun to write a later one.
        """
        there: dict[int, list[Path]] = {}
        leftovers = []
        for folder in self.folder.glob("step_*"):
            number, dot, _ = folder.name.removeprefix("step_").partition(".")
            if number.isdecimal() and int(number) <= self.ledger.step:
                abandoned = before < int(number) < self.ledger.step
                leftovers += [folder] if dot or abandoned else []
                there.setdefault(int(number), []).extend([] if dot or abandoned else [folder])
        steps = sorted(step for step, folders in there.items() if folders)
        for step in steps[: -self.keep_last] if self.keep_last else []:
            if not (self.keep_every_steps and step and step % self.keep_every_steps == 0):
                leftovers += there[step]
        return leftovers


def _first(call: Callable[[], None]) -> None:
    """call() on rank 0; what it refuses or the disk does not take, all ranks raise as ValueError. Collective."""

    def write() -> None:
        try:
            if dist.get_rank() == 0:
                call()
        except OSError as error:
            path = error.filename or "a file of the run"
            raise ValueError(
                f"{path}: {error.strerror or error}; free some space there and start the same command again"
            ) from None

    together(write)


@contextmanager
def _intact(partial: Path) -> Iterator[None]:
    """Context of the writing of a checkpoint: what goes wrong is told as a ValueError, and what was written is gone."""
    try:
        yield
    except (OSError, ValueError) as error:
        if dist.get_rank() == 0:
            delete(partial)  # it may be what fills the disk
        raise not_written(partial, reason_of(error)) from error


def _written(partial: Path, share: Share) -> Written:
    """What this rank has written of its share. Raises ValueError that names rank and file."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # other threads read the tensors, on streams of their own
    try:
        partial.mkdir(parents=True, exist_ok=True)  # another host may not see yet that it is there
        return write_files(partial, share.files, share.read)
    except OSError as error:
        name = Path(error.filename).name if error.filename else "a file"
        raise ValueError(f"rank {dist.get_rank()}: {name}: {error.strerror or error}") from None
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise ValueError(f"rank {dist.get_rank()}: {NO_MEMORY} ({reason_of(error)})") from None


def check_room(run_dir: Path, needed_bytes: int) -> None:
    """Raise ValueError if the disk cannot hold one more checkpoint of that size. The run directory may not exist."""
    folder = run_dir.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    problem = _shortage(run_dir / "checkpoints", needed_bytes, shutil.disk_usage(existing).free)
    if problem:
        raise ValueError(problem)


def _cannot_hold(partial: Path, needed_bytes: int) -> str | None:
    """Make the folder, or say in one line why the checkpoint cannot go there."""
    try:
        partial.mkdir(parents=True)
        free_bytes = shutil.disk_usage(partial).free
    except OSError as error:
        return f"{partial}: {error.strerror or error}; choose a writable run_dir"
    problem = _shortage(partial.parent, needed_bytes, free_bytes)
    if problem:
        partial.rmdir()
    return problem


def _shortage(folder: Path, needed_bytes: int, free_bytes: int) -> str | None:
    if needed_bytes <= free_bytes:
        return None
    return (
        f"no space left in {folder}: the checkpoint needs {_amount(needed_bytes)} and "
        f"{_amount(free_bytes)} are free; free some space and start the same command again"
    )


def _amount(num_bytes: int) -> str:
    unit, name = next((one for one in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= one[0]), (1e3, "kB"))
    return f"{num_bytes / unit:.2f} {name}"
