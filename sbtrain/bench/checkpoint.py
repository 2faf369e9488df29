"""bench checkpoint: how long training waits for a checkpoint: ours, megatron's synchronous and asynchronous save, and
a pinned copy of as many bytes, which is the least that anything can take that leaves the device.

Every rank stands for one data-parallel rank of the model: bf16 weights and fp32 optimizer state in as many tensors as
ZeRO cuts it into. A single process can stand for one of dp=8 ranks: nothing but small numbers goes between them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from parallel import mcore
from parallel.layout import Layout
from parallel.mesh import device, start_distributed
from parallel.pieces import Box, Piece
from sbtrain.bench.options import demand_positive
from sbtrain.bench.record import aligned, machine, save, shown
from sbtrain.bench.shapes import TINY, model_config
from sbtrain.bench.timing import release_memory, spread, synchronize
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.config.load import load
from sbtrain.config.typed import plain
from sbtrain.plan.memory import rank_parameters

FILE = "bench_checkpoint.json"
PEERS = ("sync", "async", "persistent")
_SHORTEST = 4 << 30
"""Bytes of the copy that gives the ceiling, where the state has as many."""


@dataclass(frozen=True)
class CheckpointOptions:
    """Keys of `bench.py checkpoint`.

    model, dp: a rank holds 1/dp of the model's training state. layers: of the model; 0 takes the recipe's.
    bucket_elements: parameters that megatron reduces at once, of which a rank owns 1/dp; a share has two tensors.
    snapshots: timed copies to host memory, after the first, which also gets the memory. writes: timed saves of every
    kind. peers: sync, async and persistent are megatron's own, the last two with a process per save and with one for
    all. folder: on the disk that is to be measured; emptied afterwards.
    """

    model: str = "7b"
    layers: int = 0
    dp: int = 8
    bucket_elements: int = 40_000_000
    snapshots: int = 5
    writes: int = 1
    peers: tuple[str, ...] = ("sync", "async")
    folder: str = "runs/bench/checkpoint"
    out: str = "runs/bench"


class _State:
    """Stands in for an engine: named tensors on the device, as random as weights are."""

    def __init__(self, num_parameters: int, options: CheckpointOptions):
        rank, place = dist.get_rank(), device()
        num_buckets = max(1, -(-num_parameters // options.bucket_elements))
        share = max(10, num_parameters // num_buckets // options.dp)
        self.tensors: dict[str, Tensor] = {}
        for bucket in range(num_buckets):
            weights = torch.randn(share, device=place).bfloat16()
            for name, part in zip("ab", weights.split([share * 7 // 10, share - share * 7 // 10])):
                self.tensors[f"weight.{rank}.{bucket}.{name}"] = part
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    self.tensors[f"{key}.{rank}.{bucket}.{name}"] = torch.randn(part.numel(), device=place)
        self.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def own_state(self) -> tuple[list[Piece], list[str]]:
        return [
            Piece(name, tuple(tensor.shape), (Box(0, (0,), tuple(tensor.shape)),), lambda tensor=tensor: tensor)
            for name, tensor in self.tensors.items()
        ], []

    def common_state(self) -> dict:
        return {"optimizer": {"step": 1}}

    def sharded(self) -> dict:
        """The same as megatron's sharded state dict."""
        return {name: mcore.ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in self.tensors.items()}


def bench_checkpoint(options: CheckpointOptions, command: str) -> int:
    """Measure, print and save. Returns 0. Raises ValueError for bad options."""
    demand_positive(options, "dp", "bucket_elements", "snapshots", "writes")
    unknown = [peer for peer in options.peers if peer not in (*PEERS, "none")]
    if unknown:
        raise ValueError(f"peers={unknown[0]} is not known; choose from: none, {', '.join(PEERS)}")
    count = _num_parameters(options)
    start_distributed()
    state = _State(count, options)
    ceiling = pinned_copy(state.num_bytes)
    rows = {name: _told(name, way(state, options)) for name, way in (("flash", flash), ("waited", waited))}
    for peer in options.peers:
        if peer != "none":
            rows[peer] = _told(peer, _tried(lambda peer=peer: megatron(state, options, peer)))
    report = {
        "benchmark": "checkpoint",
        "command": command,
        "options": plain(options),
        "machine": machine(device()),
        "num_ranks": dist.get_world_size(),
        "rank_bytes": state.num_bytes,
        "num_tensors": len(state.tensors),
        "pinned_copy_bytes_per_s": ceiling,
        "rows": rows,
    }
    if dist.get_rank() == 0:
        path = save(options.out, FILE, report)
        print(f"{summary(report)}\n\n{path}", flush=True)
    dist.barrier()
    return 0


def _num_parameters(options: CheckpointOptions) -> int:
    if options.model == "tiny":
        model = TINY
        return int(rank_parameters(replace(model, pattern="LS"), Layout(), range(model.num_layers)))
    known = model_config(options.model, num_layers=options.layers or 2, pattern="LS")  # refuses unknown names
    if not options.layers:
        name = options.model if options.model.endswith("_cpt") else f"{options.model}_cpt"
        known = load([f"recipe={name}", "dry_run=true"]).model
    return int(rank_parameters(known, Layout(), range(known.num_layers)))


def pinned_copy(num_bytes: int) -> float:
    """Bytes per second of one large copy from the device to pinned memory, of the slowest rank. Collective."""
    place = device()
    size = min(num_bytes, _SHORTEST)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=place)
    target = torch.empty(size, dtype=torch.uint8, pin_memory=place.type == "cuda")
    seconds = [seconds_of(lambda: target.copy_(source, non_blocking=True)) for _ in range(6)][1:]
    return size / spread(seconds)["median"]


def flash(state: _State, options: CheckpointOptions) -> dict:
    """Ours: seconds of the first snapshot, of later ones, and until a save is a checkpoint. Collective."""
    folder = emptied(options.folder)
    with closing(Store(folder, Ledger(folder), keep_last=1, op_table={}, asynchronous=True)) as store:
        first_s = seconds_of(lambda: store.snapshot(state, RunState(stage="bench", step=1)))
        store.save(state, RunState(stage="bench", step=1))
        store.flash.settle()  # by then the writer process has started
        steps = range(2, 2 + options.snapshots)
        blocked = [
            seconds_of(lambda step=step: store.snapshot(state, RunState(stage="bench", step=step))) for step in steps
        ]
        written, saves = [], []
        for step in range(steps.stop, steps.stop + options.writes):
            began = time.perf_counter()
            saves.append(seconds_of(lambda step=step: store.save(state, RunState(stage="bench", step=step))))
            store.flash.settle()
            written.append(time.perf_counter() - began)
    emptied(options.folder)
    return {"first_s": first_s, "blocked_s": spread(blocked + saves), "written_s": spread(written)}


def waited(state: _State, options: CheckpointOptions) -> dict:
    """Ours, with training waiting for the disk; the first one, which finds out what goes where, apart. Collective."""
    folder, blocked = emptied(options.folder), []
    with closing(Store(folder, Ledger(folder), keep_last=1, op_table={})) as store:
        for step in range(1, options.writes + 2):
            blocked.append(seconds_of(lambda step=step: store.save(state, RunState(stage="bench", step=step))))
    emptied(options.folder)
    return {"first_s": blocked[0], "blocked_s": spread(blocked[1:]), "written_s": spread(blocked[1:])}


def megatron(state: _State, options: CheckpointOptions, kind: str) -> dict:
    """megatron's save of the same tensors; the first one, which starts processes, apart. Collective."""
    queue = None if kind == "sync" else mcore.AsyncCallsQueue(persistent=kind == "persistent")
    blocked, written = [], []
    for _ in range(options.writes + 1):
        folder = emptied(options.folder) / "step_1.partial"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        began = time.perf_counter()
        blocked.append(seconds_of(lambda folder=folder: _begin_save(state, folder, queue)))
        if queue is not None:
            queue.maybe_finalize_async_calls(blocking=True)
        written.append(time.perf_counter() - began)
    if queue is not None:
        queue.close()
    emptied(options.folder)
    return {"first_s": blocked[0], "blocked_s": spread(blocked[1:]), "written_s": spread(written[1:])}


def _begin_save(state: _State, folder: Path, queue) -> None:
    if queue is None:
        mcore.dist_checkpointing.save(state.sharded(), str(folder), validate_access_integrity=False)
        return
    about = dict(validate_access_integrity=False, async_sharded_save=True)
    queue.schedule_async_request(mcore.dist_checkpointing.save(state.sharded(), str(folder), **about))


def _tried(measure: Callable[[], dict]) -> dict:
    """What it gives, or why a peer cannot be measured here, which is no reason to lose the rest."""
    try:
        return measure()
    except (Exception, CheckpointException) as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        release_memory(device())


def _told(name: str, row: dict) -> dict:
    """The row; printed at once on rank 0, since the next one may take minutes."""
    if dist.get_rank() == 0:
        seconds = "blocked {blocked_s[median]:.3f} s, on disk after {written_s[median]:.1f} s"
        print(f"{name}: {row['failed'] if 'failed' in row else seconds.format(**row)}", flush=True)
    return row


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of call() and of what it leaves on the device, of the slowest rank. Collective."""
    synchronize(device())
    dist.barrier()
    began = time.perf_counter()
    call()
    synchronize(device())
    slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device())
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def emptied(name: str) -> Path:
    """The folder, with nothing in it. Collective."""
    folder = Path(name)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return folder


def summary(report: dict) -> str:
    """One line for each way to save."""
    size, ceiling, table = report["rank_bytes"], report["pinned_copy_bytes_per_s"], []
    for name, row in report["rows"].items():
        if "failed" in row:
            table.append((name, *["-"] * 5))
            continue
        blocked = row["blocked_s"]["median"]
        rate = size / blocked
        table.append(
            (
                name,
                shown(row["first_s"], ".3f"),
                f"{blocked:.3f} ({row['blocked_s']['min']:.3f}-{row['blocked_s']['max']:.3f})",
                f"{rate / 1e9:.1f}",
                f"{rate / ceiling:.0%}",
                shown(row["written_s"]["median"], ".2f"),
            )
        )
    header = ("save", "first s", "blocked s (range)", "GB/s", "of pinned copy", "on disk after s")
    failures = [f"{name}: {row['failed']}" for name, row in report["rows"].items() if "failed" in row]
    about = (
        f"{report['num_ranks']} rank(s) x {size / 1e9:.2f} GB in {report['num_tensors']} tensors on "
        f"{report['machine']['device']}; pinned copy {ceiling / 1e9:.1f} GB/s, the least: {size / ceiling:.3f} s"
    )
    return "\n".join([about, "", aligned(header, table), *failures])
