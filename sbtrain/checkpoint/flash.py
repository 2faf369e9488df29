"""Flash: checkpoints that training waits for only while its state is copied to host memory.

Every rank copies its own share into one of two slots of shared memory and goes on; its writer process writes the slot.
When all writers are done, which the ranks learn from numbers that they exchange at the end of every step anyway, rank
0's writer makes a checkpoint of the folder, and only then the ledger calls it the newest.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from parallel import mcore
from parallel.collectives import together
from parallel.engine import Engine
from parallel.mesh import device
from parallel.place import primitive, section
from sbtrain.checkpoint.manifest import delete
from sbtrain.checkpoint.memory import NUM_SLOTS, SharedMemory, check_memory
from sbtrain.checkpoint.partials import Partials, not_written
from sbtrain.checkpoint.share import Share, bytes_of
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.writer import Delete, Done, Files, Seal, Write
from sbtrain.checkpoint.writing import WriterProcess

_MOST_TRIES = 2
_LOOK_S = 0.02
DIED = "its writer process ended"


@dataclass
class _Pending:
    """A snapshot on its way to the disk."""

    token: int
    step: int
    slot: int
    small: dict[str, bytes | dict]
    sealing: bool = False
    written: Done | None = None
    problem: str | None = None
    num_tries: int = 1
    answers: list[Done] = field(default_factory=list)


@dataclass(frozen=True)
class _Snapshot:
    """What a slot holds."""

    state: RunState
    slot: int
    common: dict


@dataclass
class Flash:
    """Of one rank. sealed(step): what all ranks do when a checkpoint is whole; folders to delete then, on rank 0.

    folder: checkpoints/ of the run. content(state): of state.json. On rank 0 both raise ValueError: check_lock() where
    nothing may be written to the run directory any more, check_room(n) where the disk has none for n bytes.
    """

    folder: Path
    partials: Partials
    content: Callable[[RunState], dict]
    sealed: Callable[[int], list[Path]]
    check_lock: Callable[[], None]
    check_room: Callable[[int], None]
    _memory: SharedMemory = field(default_factory=SharedMemory)
    _writer: WriterProcess | None = None
    _share: Share | None = None
    _files: Files | None = None
    _pending: list[_Pending] = field(default_factory=list)
    _newest: _Snapshot | None = None
    _token: int = 0
    _deletes: set[int] = field(default_factory=set)
    _metrics: dict = field(default_factory=dict)

    def __post_init__(self):
        self._writer = self._writer or WriterProcess(self._memory.descriptor)

    def take(self, engine: Engine, state: RunState, *, persist: bool) -> None:
        """Copy the engine's state to host memory; persist: and write it to the disk from there. Collective.

        While a snapshot is being written, one for the memory alone is skipped; one for the disk is copied to the other
        slot, or waits until there is one. Raises ValueError for what the disk or the host memory cannot hold.
        """
        if self._pending and (not persist or self._pending[-1].step == state.step):
            self._add("checkpoint_snapshots_skipped", int(not persist))
            return
        with section("snapshot", patient=True):
            if self._share is None or self._share.engine is not engine:
                self.settle()
                self._prepare(engine)
            if self._newest is None or self._newest.state.step != state.step:
                slot = self._free_slot()
                self._newest = None  # it may have been in that slot
                self._copy(slot)
                self._newest = _Snapshot(state, slot, engine.common_state())
            if persist:
                _on_first(self.check_lock)
                small = {"state.json": self.content(state), "common.pt": bytes_of(self._newest.common)}
                self._pending.append(_Pending(self._next_token(), state.step, self._newest.slot, small))
                if len(self._pending) == 1:
                    self._begin()

    def restore(
        self, engine: Engine, *, after: int, before: int, wanted: Callable[[RunState], bool]
    ) -> RunState | None:
        """Put the engine back to its newest snapshot, if that is of a step between these two; its state. Collective.

        wanted(state): the last word on it, asked of all ranks. None, and nothing is changed, where there is none of
        that kind, on any rank. What is being written goes on.
        """
        mine = self._newest if self._share is not None and self._share.engine is engine else None
        steps = [None] * dist.get_world_size()
        with primitive("steps of the snapshots"):
            dist.all_gather_object(steps, mine and mine.state.step)
        if mine is None or set(steps) != {mine.state.step} or not after < mine.state.step < before:
            return None
        if not wanted(mine.state):
            return None
        self._share.put_back(self._memory.bytes, mine.slot, mine.common)
        return mine.state

    def is_writing(self, step: int) -> bool:
        """Whether that step's checkpoint is on its way to the disk."""
        return any(each.step == step for each in self._pending)

    def flags(self) -> list[int]:
        """What this rank adds to the exchange of a step: whether it is still writing, whether that failed."""
        if not self._pending:
            return [0, 0]
        head, alive = self._pending[0], self._listen()
        if not alive and head.problem is None and self._waits(head):
            head.problem = DIED
        return [int(self._waits(head)), int(head.problem is not None)]

    def heard(self, flags: list[int]) -> None:
        """The largest flags of all ranks: go on with what is being written. Collective. Raises ValueError, see take."""
        if not self._pending:
            return
        busy, failed = flags
        if failed:
            self._recover_from()
        elif not busy:
            with section("checkpoint save", patient=True):
                self._finish() if self._pending[0].sealing else self._seal()

    def settle(self) -> None:
        """Wait until everything that was to be persisted is. Collective."""
        self._wait_for(0)

    def forget(self) -> None:
        """Let go of the engine that was saved last, after settle."""
        self._share = self._newest = None

    def take_metrics(self) -> dict:
        """What happened since the last call, for metrics.jsonl; empty where nothing did."""
        found, self._metrics = self._metrics, {}
        return found

    def close(self) -> None:
        """End the writer and give the memory back. What is still being written is no checkpoint."""
        if self._writer is not None:
            self._writer.kill() if self._pending else self._writer.close()
        self._share = self._newest = None
        self._memory.close()

    def _wait_for(self, num_pending: int) -> None:
        """Until no more than that are on their way to the disk."""
        began = time.monotonic()
        with section("checkpoint save", patient=True):
            while len(self._pending) > num_pending:
                self._look()
                self._add("checkpoint_wait_s", -began + (began := time.monotonic()))

    def _look(self) -> None:
        """What the steps of a run do, while nothing else is done."""
        self.heard(_largest(self.flags()))
        if self._pending:
            time.sleep(_LOOK_S)

    def _listen(self) -> bool:
        """Take in what this rank's writer has answered; whether it lives."""
        answers, alive = self._writer.answers()
        for answer in answers:
            self._deletes.discard(answer.token)
            head = self._pending[0] if self._pending else None
            if head is not None and answer.token == head.token:
                head.written, head.problem = (None, answer.problem) if answer.problem else (answer, None)
        if not alive:
            self._deletes.clear()  # the next checkpoint finds what is left
        return alive

    def _waits(self, head: _Pending) -> bool:
        """Whether the writer of this rank has still to answer."""
        return head.written is None and not (head.sealing and dist.get_rank())

    def _free_slot(self) -> int:
        """The slot that is not being written, waiting for one if need be; the newest snapshot's is the last choice."""
        self._wait_for(NUM_SLOTS - 1)
        taken = [each.slot for each in self._pending]
        free = [slot for slot in range(NUM_SLOTS) if slot not in taken]
        return next((slot for slot in free if not (self._newest and self._newest.slot == slot)), free[0])

    def _copy(self, slot: int) -> None:
        began = time.perf_counter()
        num_bytes = self._share.copy(self._memory.bytes, slot)
        blocked_s = time.perf_counter() - began
        self._metrics["checkpoint_blocked_s"] = blocked_s
        self._metrics["checkpoint_bytes"] = num_bytes
        self._metrics["checkpoint_gb_per_s"] = num_bytes / max(blocked_s, 1e-9) / 1e9

    def _begin(self) -> None:
        """Have the first one in the queue written, if there is room: those before it are whole by now. Collective."""
        try:
            self._find_room()
        except ValueError:
            self._pending.clear()
            raise
        self._send_write()

    def _find_room(self) -> None:
        """Raise ValueError where the disk has no room, also behind the deletes that are under way. Collective."""

        def check() -> None:
            self.check_room(self._share.total_bytes)

        try:
            _on_first(check)
        except ValueError:
            with section("checkpoint save", patient=True):
                while any(_largest([len(self._deletes)])):
                    time.sleep(_LOOK_S)
                    self._listen()
            _on_first(check)

    def _send_write(self) -> None:
        head = self._pending[0]
        self._writer.send(Write(head.token, self._partial(head), head.slot * self._share.slot_bytes))

    def _seal(self) -> None:
        """All ranks have written: rank 0's writer finishes the folder. Raises ValueError where it may not."""
        _on_first(self.check_lock)
        head, gathered = self._pending[0], [None] * dist.get_world_size()
        with primitive("places in a checkpoint"):
            dist.gather_object(head.written, gathered if dist.get_rank() == 0 else None)
        head.sealing, head.written, head.num_tries = True, None, 1
        if dist.get_rank() == 0:
            head.small = {**head.small, "metadata.json": mcore.CHECKPOINT_FORMAT}
            head.answers = gathered
            self._metrics["checkpoint_write_s"] = max(each.seconds for each in gathered)
            self._send_seal(head)

    def _send_seal(self, head: _Pending) -> None:
        final = self.folder / f"step_{head.step}"
        written = [each.written for each in head.answers]
        self._writer.send(Seal(head.token, self._partial(head), final, head.small, self._share.metadata, written))

    def _finish(self) -> None:
        """The checkpoint is whole: say so in the ledger, delete old ones, begin with the next in the queue."""
        head = self._pending.pop(0)
        old = self.sealed(head.step)
        if old:
            self._deletes.add(self._next_token())
            self._writer.send(Delete(self._token, old))
        if self._pending:
            self._begin()

    def _recover_from(self) -> None:
        """Somebody could not write. A writer that died is replaced once; for anything else the run must end."""
        head, problems = self._pending[0], [None] * dist.get_world_size()
        with primitive("problems of a checkpoint"):
            dist.all_gather_object(problems, head.problem)
        found = {rank: problem for rank, problem in enumerate(problems) if problem}
        if set(found.values()) == {DIED} and head.num_tries < _MOST_TRIES:
            head.num_tries += 1
            if dist.get_rank() == 0:
                ranks = ", ".join(map(str, found))
                print(f"warning: step {head.step}: the writer process of rank {ranks} ended; another one", flush=True)
            _on_first(self.check_lock)
            if head.problem:
                self._replace_writer(head)
            return
        self._end_writer()
        self._writer = None
        self._pending.clear()
        self.forget()
        with primitive("end of the writers"):
            dist.barrier()
        partial = self._partial(head)
        if dist.get_rank() == 0:
            delete(partial)  # it may be what fills the disk
        reasons = "; ".join(f"rank {rank}: {problem}" for rank, problem in found.items())
        raise not_written(partial, reasons)

    def _end_writer(self) -> None:
        self._writer.kill()
        self._deletes.clear()

    def _replace_writer(self, head: _Pending) -> None:
        self._end_writer()
        self._writer = WriterProcess(self._memory.descriptor)
        self._writer.send(self._files)
        head.problem = None
        self._send_seal(head) if head.sealing else self._send_write()

    def _partial(self, head: _Pending) -> Path:
        return self.partials.of(head.step)

    def _next_token(self) -> int:
        self._token += 1
        return self._token

    def _prepare(self, engine: Engine) -> None:
        """Where everything goes, once per engine; and the memory for it. Collective."""
        began = time.perf_counter()
        self.forget()
        share = Share.of(engine)
        files = Files(share.files, max(NUM_SLOTS * share.slot_bytes, self._memory.size))
        self._reserve(files.memory_bytes)
        self._writer = self._writer or WriterProcess(self._memory.descriptor)
        self._writer.send(files)
        self.partials.open()
        _on_first(self.check_lock)
        _on_first(self.partials.clear)  # nobody writes now
        self._share, self._files = share, files
        self._metrics["checkpoint_first_s"] = time.perf_counter() - began

    def _reserve(self, num_bytes: int) -> None:
        """The shared memory, if all ranks of this host can have theirs. Collective."""
        wanted = [None] * dist.get_world_size()
        with primitive("host memory of all ranks"):
            dist.all_gather_object(wanted, (platform.node(), num_bytes - self._memory.size))
        here = [more for host, more in wanted if host == platform.node()]

        together(lambda: check_memory(sum(here), num_ranks=len(here)))  # all look before anyone takes
        together(lambda: self._memory.reserve(num_bytes, pin=device().type == "cuda"))

    def _add(self, name: str, value: float) -> None:
        if value:
            self._metrics[name] = self._metrics.get(name, 0) + value


def _on_first(check: Callable[[], None]) -> None:
    """check() on rank 0; what it refuses, all ranks raise. Collective."""
    together(lambda: None if dist.get_rank() else check())


def _largest(flags: list[int]) -> list[int]:
    """The largest of all ranks. Collective."""
    tensor = torch.tensor(flags, device=device())
    with primitive("checkpoint being written"):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()
