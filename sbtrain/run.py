"""run(recipe): the whole story. Carry a recipe through its stages from wherever the last run stopped."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch.distributed as dist

import ops
from parallel.collectives import together
from parallel.job import job_id
from parallel.layout import Layout
from parallel.mesh import Mesh, device, end_distributed
from parallel.op_table import agree_on_ops, op_table
from parallel.place import primitive, section
from parallel.told import told
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.lock import RunLock, held
from sbtrain.checkpoint.memory import check_host
from sbtrain.checkpoint.partials import Partials
from sbtrain.checkpoint.reading import read_state
from sbtrain.checkpoint.recover import recover, step_folders
from sbtrain.checkpoint.run_dir import Exit, check_folder, check_owner, describe_run, run_folder, watched
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store, check_room
from sbtrain.config.rules import check_training, world_problem
from sbtrain.config.schema import Recipe
from sbtrain.convert.export import export_checkpoint, warm_in_note
from sbtrain.convert.start import check_source
from sbtrain.metrics.sinks import Sinks, open_sinks
from sbtrain.model.build import build_chunks
from sbtrain.plan.auto_layout import fit_world
from sbtrain.plan.memory import checkpoint_bytes
from sbtrain.report.page import write_report
from sbtrain.report.tables import summary_table
from sbtrain.stage import first_weights, run_stage, stage_loader
from sbtrain.train.evaluate import Evaluations, HeldOut
from sbtrain.train.health import keep_clocks
from sbtrain.train.watch import Watch


def run(recipe: Recipe) -> tuple[Exit, str]:
    """Train every unfinished stage, then export and report. Collective. Returns the exit code and the reason.

    Raises ValueError, before anything is written, for a recipe that cannot run here. Where a rank is killed or hangs,
    the process ends with Exit.RANK_LOST and a line that names the rank.
    """
    lock, ours = RunLock(run_folder(recipe), job=job_id()), not dist.is_initialized()
    with ExitStack() as stack:
        with watched(recipe, lock):
            stack.enter_context(hold(recipe, lock))
            recipe, ledger, evaluations = prepare(recipe)
            code, reason = carry(recipe, ledger, evaluations, lock)
            first = dist.get_rank() == 0
            if code is not Exit.DONE:
                told.over()  # another signal is no other reason
        if code is Exit.DONE and ours:
            end_distributed()
        if code is Exit.DONE and first and not ledger.unfinished(list(recipe.stages)):
            finish(recipe, ledger)  # takes as long as it takes: the others have left
    return code, reason


def hold(recipe: Recipe, lock: RunLock) -> AbstractContextManager[RunLock]:
    """Context in which no other job works in the run directory. Raises ValueError if it cannot be this recipe's."""
    together(lambda: check_owner(recipe))
    return held(lock)


def carry(recipe: Recipe, ledger: Ledger, evaluations: Evaluations, lock: RunLock) -> tuple[Exit, str]:
    """The stages, from wherever the last start stopped."""
    store = open_store(recipe, ledger, lock, asynchronous=recipe.checkpoint.asynchronous)
    first = dist.get_rank() == 0
    with ExitStack() as stack:
        watch = stack.enter_context(open_watch(recipe, ledger, store))  # last to leave: a signal ends no close
        stack.callback(store.close)
        with section("opening of the sinks", patient=True):
            sinks = open_run_sinks(recipe, ledger.step)
        stack.callback(close_sinks, sinks)
        for name in stages_here(recipe, ledger):
            if watch.must_stop() or not run_stage(recipe, name, store, evaluations, sinks, watch):
                return Exit.REQUEUE, watch.reason
            together(lambda name=name: ledger.finish(name, write=first))
    with primitive("end of the run"):
        dist.barrier()
    left = ledger.unfinished(list(recipe.stages))
    return Exit.DONE, f"stage {recipe.stop_after} is done, {left[0]} comes next" if left else "all stages are done"


def stages_here(recipe: Recipe, ledger: Ledger) -> list[str]:
    """The stages that this start carries the run through: those that are not done, up to stop_after."""
    names = list(recipe.stages)
    last = names.index(recipe.stop_after) if recipe.stop_after else len(names)
    return ledger.unfinished(names[: last + 1])


def open_store(recipe: Recipe, ledger: Ledger, lock: RunLock, *, asynchronous: bool = False) -> Store:
    """The checkpoints of the run."""
    kept = recipe.checkpoint
    return Store(
        run_folder(recipe),
        ledger,
        keep_last=kept.keep_last,
        keep_every_steps=kept.keep_every_steps,
        op_table=op_table(),
        check_lock=lock.check,
        asynchronous=asynchronous,
    )


def open_watch(recipe: Recipe, ledger: Ledger, store: Store) -> Watch:
    """What looks out for signals, broken numbers, slow ranks and short resources between the steps of all stages."""
    return Watch(
        save_every_steps=recipe.checkpoint.every_steps,
        device=device(),
        rules=recipe.watch,
        run_dir=run_folder(recipe),
        checkpoint_bytes=checkpoint_bytes(recipe),
        keep_clocks=partial(keep_clocks, ledger, store.check_lock),
        snapshot_every_steps=recipe.checkpoint.snapshot_every_steps,
        writing=store.flash,
    )


def convert(recipe: Recipe) -> Path:
    """Write the recipe's first weights as checkpoint step_0 of its run directory, for training to start from.

    Each rank streams its own shard. The first stage's layout is used where it fits the world, else every rank holds
    the whole model. Collective. Raises ValueError, before anything is written, if the run has begun already or the
    source cannot be read.
    """
    name, stage = next(iter(recipe.stages.items()))
    lock, ours = RunLock(run_folder(recipe), job=job_id()), not dist.is_initialized()
    with ExitStack() as left, watched(recipe, lock), ExitStack() as stack:
        left.enter_context(hold(recipe, lock))
        ledger = together(lambda: unbegun(recipe))
        layout = Layout() if world_problem(stage, dist.get_world_size()) else stage.layout
        mesh = stack.enter_context(Mesh.build(layout, patience_s=recipe.runtime.patience_s))
        first = first_weights(recipe, name, stage, mesh)
        first.prepare()
        chunks = build_chunks(recipe.model, mesh, precision=recipe.precision, seq_len=stage.seq_len)
        together(lambda: first.fill(chunks))
        describe(recipe)
        first.check(chunks)
        open_store(recipe, ledger, lock).save_weights(chunks, mesh, RunState(stage=name))
    if ours:
        end_distributed()
    return ledger.checkpoint


def unbegun(recipe: Recipe) -> Ledger:
    """The ledger of a run that has nothing yet, if its first weights can be read and written here."""
    check_owner(recipe)
    ops.use(recipe.ops)
    ops.table()  # resolves every op before anything is written
    ledger = Ledger(run_folder(recipe))
    if ledger.checkpoint is not None or step_folders(run_folder(recipe)):
        there = ledger.checkpoint or "checkpoints"
        raise ValueError(f"run_dir={recipe.run_dir} already holds {there}; choose a new run_dir")
    if recipe.start.path:
        check_source(recipe.start.path, model=recipe.model)
    check_room(run_folder(recipe), checkpoint_bytes(recipe, optimizer=False))
    return ledger


def prepare(recipe: Recipe) -> tuple[Recipe, Ledger, Evaluations]:
    """Everything that can refuse a recipe: world, owner of the run directory, data, start. Then describe the run."""
    with section("verification of the checkpoint", patient=True):
        recovered = recover(run_folder(recipe), {name: stage.tokens for name, stage in recipe.stages.items()})
    here = stages_here(recipe, recovered.ledger)
    recipe = fit_world(recipe, dist.get_world_size(), here)
    check_training(recipe)
    with section("preparation", patient=True):
        evaluations = together(lambda: inspect(recipe, here))
        partials = Partials(run_folder(recipe) / "checkpoints")
        together(lambda: None if dist.get_rank() else partials.clear())  # they may be what fills the disk
        together(lambda: check_beginning(recipe, recovered.ledger))
    agree_on_ops()
    if dist.get_rank() == 0:
        print("\n".join(ops.lines()), flush=True)
    describe(recipe)
    together(lambda: recovered.settle() if dist.get_rank() == 0 else None)
    return recipe, recovered.ledger, evaluations


def inspect(recipe: Recipe, here: list[str]) -> Evaluations:
    """What this rank can check by itself: the run directory, the ops, the data of stages, the export."""
    check_owner(recipe)
    ops.use(recipe.ops)
    unsealed: dict[str, None] = {}
    for name in here:
        stage = recipe.stages[name]
        with closing(stage_loader(recipe, name, stage, dp_rank=0, dp=stage.layout.dp(dist.get_world_size()))) as loader:
            loader.next_step()
            unsealed.update(dict.fromkeys(loader.unsealed()))
    if unsealed and dist.get_rank() == 0:
        print(f"note: no checksums for {', '.join(unsealed)}; rerun prepare_data to add them", flush=True)
    check_folder("export_dir", recipe.export_dir)
    return Evaluations(run_folder(recipe), HeldOut(recipe))


def describe(recipe: Recipe) -> None:
    """Rank 0 writes what belongs to the run from now on. Collective."""
    together(lambda: describe_run(recipe) if dist.get_rank() == 0 else None)


def check_beginning(recipe: Recipe, ledger: Ledger) -> None:
    """Raise ValueError unless what the run goes on from can be read, and disk and memory hold what it will save."""
    if ledger.checkpoint is not None:
        read_state(ledger.checkpoint)
    elif recipe.start.path:
        check_source(recipe.start.path, model=recipe.model)
    if ledger.unfinished(list(recipe.stages)):
        check_room(run_folder(recipe), checkpoint_bytes(recipe))
        check_host(recipe, checkpoint_bytes(recipe))


def open_run_sinks(recipe: Recipe, step: int) -> Sinks:
    """Sinks over the whole run, placed after `step`."""
    num_steps = sum(-(-stage.tokens // stage.global_batch_tokens) for stage in recipe.stages.values())
    num_tokens = sum(stage.tokens for stage in recipe.stages.values())
    return open_sinks(
        recipe.log,
        run_folder(recipe),
        name=recipe.name,
        num_steps=num_steps,
        num_tokens=num_tokens,
        resume_step=step + 1,
        rank=dist.get_rank(),
        config=asdict(recipe),
    )


def close_sinks(sinks: Sinks) -> None:
    """Rank 0 alone writes what is left, perhaps over a network."""
    with section("closing of the sinks", patient=True):
        sinks.close()


def finish(recipe: Recipe, ledger: Ledger) -> None:
    """Export where the recipe asks for it, write the report and print its table. Called on rank 0."""
    if recipe.export_dir and Path(recipe.export_dir).exists():
        print(f"not exported: {recipe.export_dir} exists already", flush=True)
    elif recipe.export_dir:
        form = export_checkpoint(ledger.checkpoint, recipe=recipe, out=recipe.export_dir)
        print(f"exported to {recipe.export_dir} ({form} format)", flush=True)
        if note := warm_in_note(ledger.checkpoint, recipe.model):
            print(f"note: {note}", flush=True)
    page = write_report(run_folder(recipe))
    print(f"\n{summary_table(run_folder(recipe))}\n\nreport: {page}", flush=True)
