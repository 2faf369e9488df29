"""train: one stage to its token budget."""

from __future__ import annotations

from dataclasses import replace

from parallel.collectives import together
from parallel.engine import Engine
from parallel.place import section
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.config.schema import Stage
from sbtrain.data.loader import Loader
from sbtrain.metrics.meter import Meter
from sbtrain.metrics.sinks import Sinks
from sbtrain.train.rollback import Rollback
from sbtrain.train.schedule import learning_rate
from sbtrain.train.watch import Watch


def train(
    engine: Engine,
    loader: Loader,
    state: RunState,
    stage: Stage,
    *,
    store: Store,
    meter: Meter,
    sinks: Sinks,
    watch: Watch,
    rollback: Rollback,
) -> tuple[RunState, bool]:
    """Train to the end of the stage's budget. Returns the state, saved, and False if it had to stop early."""
    finished = True
    watch.begin(state, engine.mesh)
    while state.stage_tokens < stage.tokens:
        lr = learning_rate(stage.schedule, tokens=state.stage_tokens, total_tokens=stage.tokens)
        with watch.measured(state):
            with section("data"):
                rows = together(loader.next_step)
            loss = engine.forward_backward(rows)
        grad_norm = engine.step(lr=lr)
        state = state.advanced(stage.global_batch_tokens)
        engine.trained(state.tokens)
        watch.check(state, loss=loss.mean, grad_norm=grad_norm, origin=lambda: loader.origin_of(engine.broken_rows()))
        sinks.write(
            meter.record(
                step=state.step,
                tokens=state.tokens,
                stage=state.stage,
                loss=loss.mean,
                grad_norm=grad_norm,
                lr=lr,
                step_tokens=stage.global_batch_tokens,
                extra={**engine.metrics, **watch.metrics, **store.take_metrics()},
            )
        )
        must_stop = watch.must_stop()
        left, state = state, rollback.settle(state)
        if must_stop and state.stage_tokens < stage.tokens:
            finished = False
            break
        if watch.save_due(state) or (state is not left and store.ledger.step == state.step):
            store.save(engine, replace(state, loader=loader.state_dict(), watch=watch.state_dict()))
            meter.restart_clock()
        elif watch.snapshot_due(state):
            store.snapshot(engine, replace(state, loader=loader.state_dict(), watch=watch.state_dict()))
            meter.restart_clock()
    store.save(engine, replace(state, loader=loader.state_dict(), watch=watch.state_dict()))
    store.settle()
    sinks.add(state.step, store.take_metrics())
    return state, finished
