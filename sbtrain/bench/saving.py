"""bench saving: what checkpoints cost a training step: one that is saved and waited for, and one in the background.

One process a rank, one engine of real size: steps without a checkpoint, then the same steps while the writer process
writes the one that was just copied, then a save that training waits for. All ranks of torchrun are data-parallel.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

import ops
from parallel.collectives import together
from parallel.layout import Layout
from parallel.mesh import device, start_distributed
from sbtrain.bench.checkpoint import emptied, pinned_copy, seconds_of
from sbtrain.bench.options import demand_positive
from sbtrain.bench.peers import LEARNING_RATE, EnginePeer, Work
from sbtrain.bench.record import aligned, machine, save
from sbtrain.bench.shapes import model_config
from sbtrain.bench.timing import spread
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.config.schema import Precision, Recompute, WatchConfig
from sbtrain.config.typed import plain
from sbtrain.train.watch import Watch

FILE = "bench_saving.json"
_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class SavingOptions:
    """Keys of `bench.py saving`.

    steps: without a checkpoint, in each of two blocks. saves: timed checkpoints of either kind, after the first one in
    the background, which also gets the memory. folder: on the disk that is to be measured; emptied afterwards. The
    rest: as in `bench.py train`.
    """

    model: str = "7b"
    layers: int = 8
    pattern: str = "LS"
    seq_len: int = 8192
    micro_batch: int = 1
    rows: int = 1
    precision: Precision = Precision.bf16
    recompute: Recompute = Recompute.none
    steps: int = 10
    saves: int = 2
    folder: str = "runs/bench/saving"
    out: str = "runs/bench"


def bench_saving(options: SavingOptions, command: str) -> int:
    """Measure, print and save. Returns 0. Collective. Raises ValueError for bad options."""
    demand_positive(options, "layers", "seq_len", "micro_batch", "rows", "steps", "saves")
    model = model_config(options.model, num_layers=options.layers, pattern=options.pattern)
    start_distributed()
    sizes = (options.micro_batch, options.seq_len, Layout(), options.rows)
    peer = EnginePeer(Work(model, options.precision, options.recompute, *sizes))
    try:
        measured = _background(peer, options)
        measured["waited_s"] = spread(_waited(peer, options))
    finally:
        peer.close()
        emptied(options.folder)
    measured["pinned_copy_bytes_per_s"] = pinned_copy(measured["rank_bytes"])
    report = {
        "benchmark": "saving",
        "command": command,
        "options": plain(options),
        "machine": machine(device()),
        "num_ranks": dist.get_world_size(),
        "ops": ops.table(),
        **measured,
    }
    path = together(lambda: save(options.out, FILE, report) if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        print(f"{summary(report)}\n\n{path}", flush=True)
    return 0


class _Training:
    """Steps as the training loop makes them, data and logs left out."""

    def __init__(self, peer: EnginePeer, options: SavingOptions, store: Store):
        self.peer, self.step = peer, 0
        self.watch = Watch(
            save_every_steps=0,
            device=peer.mesh.device,
            rules=WatchConfig(measure_every_steps=0),
            run_dir=Path(options.folder),
            writing=store.flash,
        )
        self.watch.begin(self.state, peer.mesh)

    @property
    def state(self) -> RunState:
        """Of a checkpoint after the steps until now."""
        return RunState(stage="bench", step=self.step)

    def run(self) -> float:
        """One step; its seconds, of the slowest rank."""
        return seconds_of(self._run)

    def _run(self) -> None:
        with self.watch.measured(self.state):
            loss = self.peer.engine.forward_backward(self.peer.rows)
        grad_norm = self.peer.engine.step(lr=LEARNING_RATE)
        self.step += 1
        self.watch.check(self.state, loss=loss.mean, grad_norm=grad_norm)
        self.watch.must_stop()


def _background(peer: EnginePeer, options: SavingOptions) -> dict:
    """Checkpoints that a process of its own writes: what is timed, in seconds, and how many bytes rank 0 copies."""
    folder, blocked, beside, until = emptied(options.folder), [], [], []
    ledger = Ledger(folder)
    with closing(Store(folder, ledger, keep_last=1, op_table={}, asynchronous=True)) as store:
        training = _Training(peer, options, store)
        for _ in range(_WARM_UP_STEPS):
            training.run()
        alone = [training.run() for _ in range(options.steps)]
        _say(f"a step: {spread(alone)['median']:.3f} s")
        first = seconds_of(lambda: store.save(peer.engine, training.state))
        store.flash.settle()
        num_bytes = store.take_metrics()["checkpoint_bytes"]
        _say(f"the first in the background: blocked {first:.3f} s")
        for _ in range(options.saves):
            training.run()
            saved, began = training.step, time.perf_counter()
            blocked.append(seconds_of(lambda: store.save(peer.engine, training.state)))
            while ledger.step != saved:
                beside.append(training.run())
            until.append(time.perf_counter() - began)
            _say(f"in the background: blocked {blocked[-1]:.3f} s, on disk after {until[-1]:.1f} s")
        alone += [training.run() for _ in range(options.steps)]
    return {
        "rank_bytes": num_bytes,
        "first_s": first,
        "blocked_s": spread(blocked),
        "step_s": spread(alone),
        "step_beside_writing_s": spread(beside),
        "num_steps_beside": len(beside),
        "written_s": spread(until),
    }


def _waited(peer: EnginePeer, options: SavingOptions) -> list[float]:
    """Seconds of saves that training waits for, after one that is not timed."""
    folder, found = emptied(options.folder), []
    with closing(Store(folder, Ledger(folder), keep_last=1, op_table={})) as store:
        for step in range(options.saves + 1):
            state = RunState(stage="bench", step=step + 1)
            found.append(seconds_of(lambda state=state: store.save(peer.engine, state)))
            _say(f"waited for: {found[-1]:.3f} s")
    return found[1:]


def _say(text: str) -> None:
    """Printed at once on rank 0, since the next one may take minutes."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def summary(report: dict) -> str:
    """What a checkpoint costs, and what it is compared with."""
    size, ceiling = report["rank_bytes"], report["pinned_copy_bytes_per_s"]
    blocked, step, beside = report["blocked_s"], report["step_s"], report["step_beside_writing_s"]
    rate = size / blocked["median"]
    speed = f"{rate / 1e9:.1f} GB/s, {rate / ceiling:.0%} of a pinned copy"
    rows = [
        ("a step", _range(step), ""),
        (f"a step beside the writing ({report['num_steps_beside']})", _range(beside), f"{_more(beside, step)} a step"),
        ("in the background: blocked", _range(blocked), speed),
        ("in the background: the first", f"{report['first_s']:.3f}", "gets and pins the memory"),
        ("in the background: on disk after", _range(report["written_s"]), ""),
        ("waited for", _range(report["waited_s"]), ""),
    ]
    about = f"{report['num_ranks']} rank(s) x {size / 1e9:.2f} GB on {report['machine']['device']}"
    return f"{about}\n\n{aligned(('what', 'seconds (range)', ''), rows)}"


def _range(times: dict[str, float]) -> str:
    return "{median:.3f} ({min:.3f}-{max:.3f})".format(**times)


def _more(times: dict[str, float], base: dict[str, float]) -> str:
    return f"{times['median'] / base['median'] - 1:+.1%}"
