"""An asynchronous store and a state of two tensors, cut over the ranks as ZeRO does it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.mesh import device, start_distributed
from parallel.pieces import Piece, boxes_of, put_back
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.memory import SharedMemory
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.convert.reader import CheckpointReader

SHAPES = {"weight": (96, 33), "optimizer.state.param.weight": (96, 33), "scale": ()}


def whole(name: str, step: int) -> torch.Tensor:
    """The global tensor of that name at that step."""
    generator = torch.Generator().manual_seed(step)
    return torch.rand(SHAPES[name], generator=generator).to(torch.bfloat16 if name == "weight" else torch.float32)


class Held:
    """Stands in for an engine: this rank's share of the global tensors."""

    def __init__(self):
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        self.tensors, self.pieces = {}, []
        for name, shape in SHAPES.items():
            count = torch.Size(shape).numel()
            start, end = (count * number // num_ranks for number in (rank, rank + 1))
            boxes = tuple(boxes_of(shape, start, end))
            if boxes:
                self.pieces.append(Piece(name, shape, boxes, lambda name=name: self.tensors[name]))
        self.set(0)

    def set(self, step: int) -> None:
        """Go on to that step; what was there is overwritten in place."""
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        for name in SHAPES:
            flat = whole(name, step).flatten()
            count = flat.numel()
            part = flat[count * rank // num_ranks : count * (rank + 1) // num_ranks].to(device())
            self.tensors.setdefault(name, part.clone()).copy_(part)

    def put_back(self, pieces: list[Piece], tensors, common: dict) -> None:
        put_back(pieces, tensors)

    def own_state(self) -> tuple:
        return self.pieces, ["extra/shard_0_1"] if dist.get_rank() == 0 else []

    def common_state(self) -> dict:
        return {"optimizer": {"step": 7}}


class Flying:
    """A store that saves in the background, and what it saves."""

    def __init__(self, folder: Path, parked: list | None = None):
        """parked: writers of earlier ones, with their memory: to start one takes seconds."""
        start_distributed()
        self.folder, self.ledger, self.held = folder, Ledger(folder), Held()
        self.store = Store(folder, self.ledger, keep_last=0, op_table={"hash": "0"})
        memory, writer = parked.pop() if parked else (SharedMemory(), None)
        self.store.flash = self.store.in_background(_memory=memory, _writer=writer)

    def park(self, parked: list) -> None:
        """Close the store; its writer may serve another one, if it has nothing left to do."""
        flash = self.store.flash
        if flash._pending or flash._writer is None or not flash._writer.answers()[1]:
            self.store.close()
        else:
            parked.append((flash._memory, flash._writer))

    @property
    def writer(self):
        return self.store.flash._writer

    def save(self, step: int, **more) -> None:
        self.held.set(step)
        self.store.save(self.held, RunState(stage="a", step=step, tokens=10 * step, **more))

    def snapshot(self, step: int) -> None:
        self.held.set(step)
        self.store.snapshot(self.held, RunState(stage="a", step=step, tokens=10 * step))

    def there(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


def check_content(folder: Path, step: int) -> None:
    """Every tensor of a checkpoint is bit for bit what it was at that step."""
    reader = CheckpointReader(folder)
    assert reader.names() == sorted(SHAPES)
    for name in SHAPES:
        assert torch.equal(reader.get(name), whole(name, step)), name


def is_gone(pid: int, *, limit_s: float = 5.0) -> bool:
    """Whether a process has ended, or does within the limit."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def lose_a_writer(rank: int, folder: str) -> list[str]:
    """Save twice on all ranks; the last rank's writer is killed while it writes the second one."""
    flying = Flying(Path(folder))
    try:
        flying.save(1)
        flying.store.settle()
        if rank == dist.get_world_size() - 1:
            os.kill(flying.writer.pid, signal.SIGSTOP)
        flying.save(2)
        if rank == dist.get_world_size() - 1:
            os.kill(flying.writer.pid, signal.SIGKILL)
        flying.held.set(3)
        flying.store.settle()
        return flying.there()
    finally:
        flying.store.close()


def disagree(rank: int, folder: str) -> tuple:
    """What ranks go back to where the last one's newest snapshot is of another step, and where it is not."""
    flying = Flying(Path(folder))
    try:
        flying.snapshot(2)
        flash, newest = flying.store.flash, flying.store.flash._newest
        if rank == dist.get_world_size() - 1:
            flash._newest = replace(newest, state=replace(newest.state, step=1))
        none = flying.store.restore_snapshot(flying.held, before=9)
        flash._newest = newest
        return none, flying.store.restore_snapshot(flying.held, before=9).step
    finally:
        flying.store.close()
