"""bench watch: what looking out costs a training step: the same engine, watched every so many steps and never.

One process, one engine: blocks of steps take turns in every round, so that a drift of the machine shows between rounds
and not between settings. A step is that of the training loop without data and logs: forward and backward, optimizer,
the checks of the watch and the exchange of signals.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

import ops
from parallel.collectives import together
from parallel.layout import Layout
from parallel.mesh import device, start_distributed
from sbtrain.bench.options import demand_positive
from sbtrain.bench.peers import LEARNING_RATE, EnginePeer, Work
from sbtrain.bench.record import aligned, machine, save
from sbtrain.bench.shapes import model_config
from sbtrain.bench.timing import synchronize
from sbtrain.checkpoint.state import RunState
from sbtrain.config.schema import Precision, Recompute, WatchConfig
from sbtrain.config.typed import plain
from sbtrain.train.watch import Watch

FILE = "bench_watch.json"
WARM_UP_STEPS = 3
"""Of each setting, at least: kernels are compiled, and what is measured from the third step on is."""


@dataclass(frozen=True)
class WatchOptions:
    """Keys of `bench.py watch`.

    every: settings of watch.measure_every_steps, the first of which the others are compared with; 0 never measures.
    steps: of a block; a multiple of the settings, or a setting has blocks with more measurements than others.
    rounds: how often all settings run. The rest: as in `bench.py train`; all ranks of torchrun are data-parallel.
    """

    model: str = "7b"
    layers: int = 8
    pattern: str = "LS"
    seq_len: int = 8192
    micro_batch: int = 1
    rows: int = 1
    precision: Precision = Precision.bf16
    recompute: Recompute = Recompute.none
    every: tuple[int, ...] = (0, 10, 1)
    steps: int = 20
    rounds: int = 5
    out: str = "runs/bench"


def bench_watch(options: WatchOptions, command: str) -> int:
    """Measure, print and save. Returns 0. Collective. Raises ValueError for bad options."""
    demand_positive(options, "layers", "seq_len", "micro_batch", "rows", "steps", "rounds")
    if len(set(options.every)) != len(options.every) or len(options.every) < 2 or min(options.every) < 0:
        raise ValueError(f"every={options.every} must be two or more different numbers of steps; write every=0,10,1")
    model = model_config(options.model, num_layers=options.layers, pattern=options.pattern)
    start_distributed()
    sizes = (options.micro_batch, options.seq_len, Layout(), options.rows)
    peer = EnginePeer(Work(model, options.precision, options.recompute, *sizes))
    try:
        watches = {every: _begun(every, peer, options) for every in options.every}
        for every, watch in watches.items():
            _block_ms(peer, watch, num_steps=max(WARM_UP_STEPS, every + 1))
        rounds = [_round(peer, watches, options, number) for number in range(options.rounds)]
    finally:
        peer.close()
    report = {
        "benchmark": "watch",
        "command": command,
        "options": plain(options),
        "machine": machine(device()),
        "world_size": dist.get_world_size(),
        "ops": ops.table(),
        "step_ms": rounds,
    }
    path = together(lambda: save(options.out, FILE, report) if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        print(f"{summary(options.every, rounds)}\n\n{path}", flush=True)
    return 0


def summary(settings: tuple[int, ...], rounds: list[dict[str, float]]) -> str:
    """A line for each setting: its step, and how much longer it is than the first one's, round by round."""
    rows = []
    for every in settings:
        times = [each[str(every)] for each in rounds]
        more = [each[str(every)] / each[str(settings[0])] - 1 for each in rounds]
        middle = f"{statistics.median(more):+.2%}"
        rows.append((str(every), f"{statistics.median(times):.2f}", middle, f"{min(more):+.2%} to {max(more):+.2%}"))
    return aligned(("measure_every_steps", "step ms", "more", "in the rounds"), rows)


def _begun(every: int, peer: EnginePeer, options: WatchOptions) -> Watch:
    rules = WatchConfig(measure_every_steps=every)
    watch = Watch(save_every_steps=0, device=peer.mesh.device, rules=rules, run_dir=Path(options.out))
    watch.begin(RunState(stage="bench"), peer.mesh)
    return watch


def _round(peer: EnginePeer, watches: dict[int, Watch], options: WatchOptions, number: int) -> dict[str, float]:
    """Milliseconds a step of each setting, which take turns in being first."""
    order = list(watches)
    order = order[number % len(order) :] + order[: number % len(order)]
    return {str(every): _block_ms(peer, watches[every], num_steps=options.steps) for every in order}


def _block_ms(peer: EnginePeer, watch: Watch, *, num_steps: int) -> float:
    """Milliseconds a step of a block, from a device that is done to a device that is done."""
    state = RunState(stage="bench")
    synchronize(peer.mesh.device)
    begin = time.perf_counter()
    for _ in range(num_steps):
        with watch.measured(state):
            loss = peer.engine.forward_backward(peer.rows)
        grad_norm = peer.engine.step(lr=LEARNING_RATE)
        state = state.advanced(1)
        watch.check(state, loss=loss.mean, grad_norm=grad_norm)
        watch.must_stop()
    synchronize(peer.mesh.device)
    return (time.perf_counter() - begin) / num_steps * 1e3
