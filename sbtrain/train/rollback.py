"""Rollback: where the loss has spiked, the run goes back to an earlier state and on with the samples behind the spike.

Weights, optimizer, schedule and step count are those of the earlier state. The data is not: none of the samples since
then is read again, those of the spike included. PaLM did so about 20 times: the same weights with other data, or the
same data with other weights, did not spike (Chowdhery et al., "PaLM", 2022, section 5.1). There the first of the
skipped batches lay some 100 steps before the spike; here it lies as far back as the state that is gone back to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.collectives import together
from parallel.engine import Engine
from parallel.place import primitive, section
from sbtrain.checkpoint.manifest import fault
from sbtrain.checkpoint.reading import read_state
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.data.loader import Loader
from sbtrain.metrics.meter import Meter
from sbtrain.metrics.sinks import Sinks
from sbtrain.train.watch import Watch


class Rollback:
    """Of one stage, whose loader, meter and logs it knows."""

    def __init__(
        self, restore: Callable[..., RunState | None], *, watch: Watch, loader: Loader, meter: Meter, sinks: Sinks
    ):
        """restore(step, tried): put the engine back to before that step and return its state, in this stage, or None.

        tried(state): whether the run went back to there, or a little before, already. None where there is nothing to
        go to. Collective; it may raise ValueError, on all ranks alike.
        """
        self._restore, self._watch, self._loader, self._meter, self._sinks = restore, watch, loader, meter, sinks

    def settle(self, state: RunState) -> RunState:
        """The state to go on from: this one, or an earlier one if its step was a spike. Call it after watch.must_stop.

        Collective. Raises ValueError where the run has gone back too often, or what it goes back to is damaged.
        """
        if not self._watch.spiked:
            return state
        with section("rollback", patient=True):
            restored = self._restore(state.step, tried=self._watch.numbers.went_back_to)
        if restored is None:
            _say("no checkpoint of this run can be gone back to yet; it goes on")
            return state
        self._watch.numbers.check_rollbacks(state, restored)
        samples = self._loader.samples_since(restored.loader)
        records = together(lambda: self._sinks.go_back(restored.step + 1))
        self._watch.go_back(state, restored, {**samples, "records": records})
        _say(
            f"back to step {restored.step} from step {state.step} of stage {state.stage}: rollback no. "
            f"{self._watch.numbers.num_rollbacks} of the run; the {samples['num_samples']} samples "
            f"since then, from no. {samples['first_sample']} on, are left out"
        )
        self._meter.restart_clock()
        return replace(restored, loader=None)


def newest_state(
    stage: str, engine: Engine, store: Store, before: int, *, tried: Callable[[RunState], bool] = lambda state: False
) -> RunState | None:
    """Put the engine back to the newest snapshot in memory, or the newest checkpoint, for a Rollback. Collective.

    stage: the one that is being trained. before: the step that the run leaves. tried(state): the run went back to
    there before, or to a little before that; a snapshot may be too near to the spike, so then it is the checkpoint,
    if there is a whole one. The state's loader is what the first run from there went on with, None at the beginning of
    the stage. None, and nothing is changed, where there is neither, or only a checkpoint without an optimizer, from a
    conversion. Raises ValueError where the checkpoint is not whole.
    """
    sound = []

    def wanted(snapshot: RunState) -> bool:
        if tried(snapshot) and _is_sound(store):
            sound.append(store.ledger.checkpoint)
        return not sound

    state = store.restore_snapshot(engine, before=before, wanted=wanted)
    if state is None:
        state = _newest_checkpoint(engine, store, sound=sound)
    if state is None:
        return None
    engine.trained(state.tokens)
    return state if state.stage == stage else state.entering(stage)


def _newest_checkpoint(engine: Engine, store: Store, *, sound: list[Path]) -> RunState | None:
    """sound: checkpoints that were read already."""
    store.settle()  # what is still being written is the newest
    if not _has_optimizer(store):
        return None
    folder = store.ledger.checkpoint
    problem = None if folder in sound else _problem(folder)
    if problem:
        raise ValueError(f"{problem}; start the same command again, it goes on from the checkpoint before")
    if engine.mesh.device.type == "cuda":
        torch.cuda.empty_cache()  # what the steps held is in no piece that fits
    state, saved = store.restore(engine), together(lambda: read_state(folder))
    return replace(state, loader=saved["loader"] if saved["stage"] == state.stage else None)


def _has_optimizer(store: Store) -> bool:
    folder = store.ledger.checkpoint
    return folder is not None and together(lambda: read_state(folder))["parts"] != ["model"]


def _is_sound(store: Store) -> bool:
    """Whether there is a checkpoint that can be gone back to. Collective; rank 0 says what is wrong with it."""
    try:
        if not _has_optimizer(store):
            return False
        problem = _problem(store.ledger.checkpoint)
    except ValueError as error:  # a host that cannot read it
        problem = str(error)
    if problem:
        _say(f"{problem}; a snapshot in memory is gone back to once more instead")
    return not problem


def _problem(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, on the first rank that finds something. Collective."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found = [None] * num_ranks
    mine = together(lambda: fault(folder, rank=rank, num_ranks=num_ranks))
    with primitive("faults of a checkpoint"):
        dist.all_gather_object(found, mine)
    return next((f"{folder}: {text}" for text in found if text), None)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"warning: {text}", flush=True)
