"""Flash: checkpoints that training waits for only while its state is copied to host memory.

Every rank copies its own share into one of two slots of shared memory and goes on; its writer process writes the slot.
When all writers are done, which the ranks learn from numbers that they exchange at the end of every step anyway, rank
0's writer makes a checkpoint of the folder, and only then the ledger calls it the newest.
"""

from __future__ import annotations

import io
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType

from parallel import mcore
from parallel.collectives import together
from parallel.engine import Engine
from parallel.mesh import device
from parallel.pieces import Box, Piece
from parallel.place import primitive, section
from sbtrain.checkpoint.manifest import delete
from sbtrain.checkpoint.memory import SharedMemory, copy_into, free_bytes, place
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.writer import Delete, Done, Files, Item, Seal, Write
from sbtrain.checkpoint.writing import WriterProcess
from sbtrain.config.schema import Recipe

NUM_SLOTS = 2
_NUM_FILES = 2
"""Of a rank, as megatron writes them."""
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
class _Plan:
    """How this rank's share lies in a slot and in its files; good for one engine. metadata: on rank 0."""

    engine: Engine
    pieces: list[Piece]
    starts: list[int]
    slot_bytes: int
    total_bytes: int
    files: Files
    metadata: Metadata | None = None


@dataclass
class Flash:
    """Of one rank. sealed(step): what all ranks do when a checkpoint is whole; folders to delete then, on rank 0.

    folder: checkpoints/ of the run. content(state): of state.json. allowed(): raises ValueError on rank 0 where nothing
    may be written to the run directory any more, or the disk has no room for so many bytes.
    """

    folder: Path
    content: Callable[[RunState], dict]
    sealed: Callable[[int], list[Path]]
    allowed: Callable[[int], None]
    _memory: SharedMemory = field(default_factory=SharedMemory)
    _writer: WriterProcess | None = None
    _plan: _Plan | None = None
    _pending: list[_Pending] = field(default_factory=list)
    _newest: tuple[RunState, int] | None = None
    _token: int = 0
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
            if self._plan is None or self._plan.engine is not engine:
                self.settle()
                self._make_plan(engine)
            if self._newest is None or self._newest[0] != state:
                slot = self._free_slot()
                self._newest = None  # it may have been in that slot
                self._copy(slot)
                self._newest = (state, slot)
            if persist:
                together(lambda: None if dist.get_rank() else self.allowed(self._plan.total_bytes))
                small = {"state.json": self.content(state), "common.pt": _bytes_of(engine.common_state())}
                self._token += 1
                self._pending.append(_Pending(self._token, state.step, self._newest[1], small))
                if len(self._pending) == 1:
                    self._begin()

    def flags(self) -> list[int]:
        """What this rank adds to the exchange of a step: whether it is still writing, whether that failed."""
        if not self._pending:
            return [0, 0]
        answers, alive = self._writer.answers()
        head = self._pending[0]
        for answer in answers:
            if answer.token == head.token:
                head.written, head.problem = (None, answer.problem) if answer.problem else (answer, None)
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
        self._plan = self._newest = None

    def take_metrics(self) -> dict:
        """What happened since the last call, for metrics.jsonl; empty where nothing did."""
        found, self._metrics = self._metrics, {}
        return found

    def close(self) -> None:
        """End the writer and give the memory back. What is still being written is no checkpoint."""
        if self._writer is not None:
            self._writer.kill() if self._pending else self._writer.close()
        self._plan = self._newest = None
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
        flags = torch.tensor(self.flags(), device=device())
        with primitive("checkpoint being written"):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            flags = flags.tolist()
        self.heard(flags)
        if self._pending:
            time.sleep(_LOOK_S)

    def _waits(self, head: _Pending) -> bool:
        """Whether the writer of this rank has still to answer."""
        return head.written is None and not (head.sealing and dist.get_rank())

    def _free_slot(self) -> int:
        """The slot that is not being written, waiting for one if need be; the newest snapshot's is the last choice."""
        self._wait_for(NUM_SLOTS - 1)
        taken = [each.slot for each in self._pending]
        free = [slot for slot in range(NUM_SLOTS) if slot not in taken]
        return next((slot for slot in free if not (self._newest and self._newest[1] == slot)), free[0])

    def _copy(self, slot: int) -> None:
        plan = self._plan
        first = slot * plan.slot_bytes
        began = time.perf_counter()
        sources = (piece.read() for piece in plan.pieces)
        num_bytes = copy_into(self._memory.bytes, sources, [first + start for start in plan.starts])
        blocked_s = time.perf_counter() - began
        self._metrics["checkpoint_blocked_s"] = blocked_s
        self._metrics["checkpoint_bytes"] = num_bytes
        self._metrics["checkpoint_gb_per_s"] = num_bytes / max(blocked_s, 1e-9) / 1e9

    def _begin(self) -> None:
        """Have the first one in the queue written."""
        head = self._pending[0]
        self._writer.send(Write(head.token, self._partial(head), head.slot * self._plan.slot_bytes))

    def _seal(self) -> None:
        """All ranks have written: rank 0's writer finishes the folder."""
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
        entries = {name: entry for each in head.answers for name, entry in each.entries.items()}
        results = [list(each.results) for each in head.answers]
        self._writer.send(
            Seal(head.token, self._partial(head), final, head.small, self._plan.metadata, results, entries)
        )

    def _finish(self) -> None:
        """The checkpoint is whole: say so in the ledger, delete old ones, begin with the next in the queue."""
        head = self._pending.pop(0)
        old = self.sealed(head.step)
        if old:
            self._writer.send(Delete(old))
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
            if head.problem:
                self._replace_writer(head)
            return
        self._writer.kill()
        self._writer = None
        self._pending.clear()
        self.forget()
        with primitive("end of the writers"):
            dist.barrier()
        partial = self._partial(head)
        if dist.get_rank() == 0:
            delete(partial)  # it may be what fills the disk
        reasons = "; ".join(f"rank {rank}: {problem}" for rank, problem in found.items())
        raise ValueError(
            f"{partial}: {reasons}; the previous checkpoint is intact, free some space and start the same command again"
        )

    def _replace_writer(self, head: _Pending) -> None:
        self._writer.kill()
        self._writer = WriterProcess(self._memory.descriptor)
        self._writer.send(self._plan.files)
        head.problem = None
        self._send_seal(head) if head.sealing else self._begin()

    def _partial(self, head: _Pending) -> Path:
        return self.folder / f"step_{head.step}.partial"

    def _make_plan(self, engine: Engine) -> None:
        """Where everything goes, once per engine; and the memory for it. Collective."""
        began = time.perf_counter()
        self.forget()
        pieces, names = engine.own_state()
        tensors = [piece.read() for piece in pieces]
        starts, slot_bytes = place([tensor.numel() * tensor.element_size() for tensor in tensors])
        items = [
            Item(_item(piece, box, tensor), tensor.dtype, start + box.start * tensor.element_size())
            for piece, tensor, start in zip(pieces, tensors, starts)
            for box in piece.boxes
        ]
        items += [_object(name) for name in names]
        metadata, total_bytes = _index([each.item for each in items], slot_bytes)
        files = Files(_split(items), max(NUM_SLOTS * slot_bytes, self._memory.size))
        self._reserve(files.memory_bytes)
        self._writer = self._writer or WriterProcess(self._memory.descriptor)
        self._writer.send(files)
        together(self._clear_away)
        self._plan = _Plan(engine, pieces, starts, slot_bytes, total_bytes, files, metadata)
        self._metrics["checkpoint_first_s"] = time.perf_counter() - began

    def _reserve(self, num_bytes: int) -> None:
        """The shared memory, if all ranks of this host can have theirs. Collective."""
        wanted = [None] * dist.get_world_size()
        with primitive("host memory of all ranks"):
            dist.all_gather_object(wanted, (platform.node(), num_bytes - self._memory.size))
        here = [more for host, more in wanted if host == platform.node()]

        together(lambda: check_memory(sum(here), num_ranks=len(here)))  # all look before anyone takes
        together(lambda: self._memory.reserve(num_bytes, pin=device().type == "cuda"))

    def _clear_away(self) -> None:
        """What an earlier start began to write. Nobody writes now."""
        if dist.get_rank() == 0:
            for leftover in self.folder.glob("step_*.partial"):
                delete(leftover)

    def _add(self, name: str, value: float) -> None:
        if value:
            self._metrics[name] = self._metrics.get(name, 0) + value


def check_host(recipe: Recipe, num_bytes: int) -> None:
    """check_memory, for a checkpoint of so many bytes, as far as a recipe tells: cluster.gpus_per_node ranks a host."""
    if recipe.checkpoint.asynchronous:
        num_ranks = min(dist.get_world_size(), recipe.cluster.gpus_per_node)
        check_memory(NUM_SLOTS * num_ranks * num_bytes // dist.get_world_size(), num_ranks=num_ranks)


def check_memory(num_bytes: int, *, num_ranks: int) -> None:
    """Raise ValueError unless this host has so many bytes more for the snapshots of its ranks."""
    free = free_bytes()
    if num_bytes > free:
        raise ValueError(
            f"checkpoint.asynchronous=true needs {num_bytes / 1e9:.1f} GB of memory on host {platform.node()}, for "
            f"{NUM_SLOTS} snapshots of {num_ranks} ranks, and {free / 1e9:.1f} GB are free; free some, use more hosts "
            "or set checkpoint.asynchronous=false"
        )


def _item(piece: Piece, box: Box, tensor: torch.Tensor) -> WriteItem:
    """A box in torch's words."""
    offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
    return WriteItem(
        index=MetadataIndex(piece.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(piece.shape),
        ),
    )


def _object(name: str) -> Item:
    """An object that is None, as megatron writes it."""
    content = _bytes_of([None])
    size = BytesIOWriteData(len(content))
    return Item(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, bytes_io_data=size), content=content)


def _index(items: list[WriteItem], num_bytes: int) -> tuple[Metadata | None, int]:
    """On rank 0: the index of all ranks' boxes, which must fill every tensor once, and the bytes of all. Collective."""
    gathered = [None] * dist.get_world_size()
    with primitive("index of a checkpoint"):
        dist.gather_object((items, num_bytes), gathered if dist.get_rank() == 0 else None)
    if dist.get_rank():
        return None, 0
    plans = [SavePlan(theirs) for theirs, _ in gathered]
    return DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)[1], sum(
        theirs for _, theirs in gathered
    )


def _split(items: list[Item]) -> dict[str, list[Item]]:
    """The boxes by file, about as many bytes in each."""
    by_index = {each.item.index: each for each in items}
    buckets = mcore.split_by_size_and_type(_NUM_FILES, [each.item for each in items])
    filled = [[by_index[item.index] for item in bucket] for bucket in buckets if bucket]
    return {f"__{dist.get_rank()}_{number}.distcp": bucket for number, bucket in enumerate(filled)}


def _bytes_of(value) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()
