"""run(recipe): the whole story. Carry a recipe through its stages from wherever the last run stopped."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import ops
from parallel.collectives import together
from parallel.engine import Engine
from parallel.job import job_id
from parallel.layout import Layout
from parallel.mesh import Mesh, device, start_distributed
from parallel.op_table import agree_on_ops, op_table
from parallel.place import primitive, section
from parallel.sequence.shard import Row
from parallel.watch import RankWatch
from sbtrain.checkpoint.flash import check_host
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.lock import RunLock, held
from sbtrain.checkpoint.recover import recover, step_folders
from sbtrain.checkpoint.run_dir import (
    Exit,
    check_folder,
    check_owner,
    describe_run,
    record_exit,
    record_start,
    run_folder,
)
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store, check_room, read_state
from sbtrain.config.rules import check_training, world_problem
from sbtrain.config.schema import Recipe, Stage
from sbtrain.convert.calibrate import teacher_of
from sbtrain.convert.export import export_checkpoint, warm_in_note
from sbtrain.convert.first import FirstWeights, fill_model
from sbtrain.convert.start import check_source
from sbtrain.data.loader import Loader, build_loader
from sbtrain.metrics.meter import Meter
from sbtrain.metrics.sinks import Sinks, open_sinks
from sbtrain.model.build import build_chunks
from sbtrain.model.flops import training_flops_per_token
from sbtrain.plan.auto_layout import fit_world
from sbtrain.plan.memory import checkpoint_bytes
from sbtrain.plan.pipeline import pipeline_table
from sbtrain.report.page import write_report
from sbtrain.report.tables import summary_table
from sbtrain.train.evaluate import Evaluations, HeldOut
from sbtrain.train.health import keep_clocks
from sbtrain.train.loop import train
from sbtrain.train.rollback import Rollback, newest_checkpoint
from sbtrain.train.watch import Watch


def run(recipe: Recipe) -> tuple[Exit, str]:
    """Train every unfinished stage, then export and report. Collective. Returns the exit code and the reason.

    Raises ValueError, before anything is written, for a recipe that cannot run here. Where a rank is killed or hangs,
    the process ends with Exit.RANK_LOST and a line that names the rank.
    """
    with ExitStack() as stack:
        with watched(recipe):
            lock = stack.enter_context(hold(recipe))
            recipe, ledger, evaluations = prepare(recipe)
            code, reason = carry(recipe, ledger, evaluations, lock)
        if code is Exit.DONE and dist.get_rank() == 0 and not ledger.unfinished(list(recipe.stages)):
            finish(recipe, ledger)  # takes as long as it takes: the others have left
    return code, reason


def watched(recipe: Recipe) -> RankWatch:
    """What ends this rank, and says why in exit.json, when another one is lost. Starts torch.distributed."""
    start_distributed(patience_s=recipe.runtime.patience_s, watched=True, deterministic=recipe.runtime.deterministic)
    folder = run_folder(recipe)
    return RankWatch(timeout_s=recipe.runtime.timeout_s, record=partial(record_exit, folder), stacks=folder / "stacks")


def hold(recipe: Recipe) -> AbstractContextManager[RunLock]:
    """Context in which no other job works in the run directory. Raises ValueError if it cannot be this recipe's."""
    together(lambda: check_owner(recipe))
    return held(run_folder(recipe), job=job_id())


def carry(recipe: Recipe, ledger: Ledger, evaluations: Evaluations, lock: RunLock) -> tuple[Exit, str]:
    """The stages, from wherever the last start stopped."""
    store = open_store(recipe, ledger, lock, asynchronous=recipe.checkpoint.asynchronous)
    first = dist.get_rank() == 0
    with ExitStack() as stack:
        stack.callback(store.close)
        with section("opening of the sinks", patient=True):
            sinks = open_run_sinks(recipe, ledger.step)
        stack.callback(close_sinks, sinks)
        watch = stack.enter_context(open_watch(recipe, ledger, store))
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


def run_stage(recipe: Recipe, name: str, store: Store, evaluations: Evaluations, sinks: Sinks, watch: Watch) -> bool:
    """One stage on its own layout: build, restore or start, train, judge. Returns False if it had to stop early."""
    stage = recipe.stages[name]
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(stage.layout, patience_s=recipe.runtime.patience_s))
        judge_teacher(recipe, mesh, evaluations, watch)
        first = None
        if store.ledger.checkpoint is None:
            first = first_weights(recipe, name, stage, mesh)
            first.prepare()
        engine = stack.enter_context(closing(build_engine(recipe, stage, mesh)))
        state = begin_stage(name, engine, store, evaluations, watch, first)
        if watch.must_stop():
            return False
        record_algorithms(recipe, state, engine)
        state, finished = train_stage(recipe, state, engine, store, sinks, watch)
        if finished and evaluations.due(name):
            finished = evaluations.add(name, engine.models, mesh, tokens=state.tokens, must_stop=watch.must_stop)
    return finished


def convert(recipe: Recipe) -> Path:
    """Write the recipe's first weights as checkpoint step_0 of its run directory, for training to start from.

    Each rank streams its own shard. The first stage's layout is used where it fits the world, else every rank holds
    the whole model. Collective. Raises ValueError, before anything is written, if the run has begun already or the
    source cannot be read.
    """
    name, stage = next(iter(recipe.stages.items()))
    with ExitStack() as stack:
        stack.enter_context(watched(recipe))
        lock = stack.enter_context(hold(recipe))
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


def build_engine(recipe: Recipe, stage: Stage, mesh: Mesh) -> Engine:
    """The recipe's model on the stage's layout, its weights still to be set."""
    with section("model"):
        chunks = build_chunks(
            recipe.model,
            mesh,
            precision=recipe.precision,
            recompute=stage.recompute,
            experts=stage.experts,
            seq_len=stage.seq_len,
            row_tokens=stage.row_tokens,
        )
        if mesh.rank == 0:
            for symbol, choice in chunks[0].sp_choices.items():
                print(f"layout.sp_algorithm.{symbol}=auto: {choice}", flush=True)
            if stage.layout.pp > 1:
                print(pipeline_table(recipe.model, stage, dp=mesh.dp), flush=True)
        return Engine(chunks, mesh, adam=asdict(recipe.optim))


def record_algorithms(recipe: Recipe, state: RunState, engine: Engine) -> None:
    """Keep in env.json how each mixer reaches over the shards from this start on, and who chose it. Collective."""
    layout, model = engine.mesh.layout, engine.models[0]
    mixers = {symbol for kind in model.kinds for symbol in kind.mixers} if layout.sp > 1 else set()
    named = {symbol: f"{getattr(layout.sp_algorithm, symbol).name} (the recipe's)" for symbol in sorted(mixers)}
    algorithms = {**named, **model.sp_choices}
    start = {"stage": state.stage, "step": state.step, "sp": layout.sp, "sp_algorithm": algorithms}
    together(lambda: record_start(recipe.run_dir, start) if dist.get_rank() == 0 else None)


def begin_stage(
    name: str, engine: Engine, store: Store, evaluations: Evaluations, watch: Watch, first: FirstWeights | None
) -> RunState:
    """Restore the newest checkpoint, or start from the recipe's first weights (and judge them)."""
    state = store.restore(engine)
    if state is None:
        first.fill(engine.models)
        engine.weights_changed()
        first.check(engine.models)
        state = RunState(stage=name)
    engine.trained(state.tokens)
    if state.step == 0 and evaluations.due("start"):
        evaluations.add("start", engine.models, engine.mesh, tokens=0, must_stop=watch.must_stop)
    if state.stage == name:
        return state
    if state.step > 0 and not store.ledger.is_done(state.stage):
        raise ValueError(
            f"{store.ledger.checkpoint} is of stage {state.stage}, which is not done, and the next one is {name}; "
            "put the stages back in their order or point ledger.json at a checkpoint of that stage"
        )
    return state.entering(name)


def first_weights(recipe: Recipe, name: str, stage: Stage, mesh: Mesh) -> FirstWeights:
    """The first weights of a run that begins with this stage."""

    def read(num_tokens: int) -> list[Row]:
        few = replace(stage, global_batch_tokens=-(-num_tokens // stage.row_tokens) * stage.row_tokens)
        with closing(together(lambda: stage_loader(recipe, name, few, dp_rank=0, dp=1))) as loader:
            return together(loader.next_step)

    return FirstWeights(recipe, mesh, seq_len=stage.seq_len, read_rows=read if recipe.data.sources else None)


def train_stage(
    recipe: Recipe, state: RunState, engine: Engine, store: Store, sinks: Sinks, watch: Watch
) -> tuple[RunState, bool]:
    """Train the state's stage. Returns the state, saved, and whether its budget is spent."""
    stage, mesh = recipe.stages[state.stage], engine.mesh
    meter = Meter(
        world_size=mesh.world_size,
        flops_per_token=training_flops_per_token(recipe.model, stage.seq_len),
        peak_tflops=recipe.cluster.peak_tflops,
    )
    with section("loader", patient=True):
        loader = together(lambda: stage_loader(recipe, state.stage, stage, dp_rank=mesh.dp_rank, dp=mesh.dp))
        if state.loader is not None:
            loader.load_state_dict(state.loader)
    restore = partial(newest_checkpoint, state.stage, engine, store)
    rollback = Rollback(restore, watch=watch, loader=loader, meter=meter, sinks=sinks)
    with closing(loader):
        return train(
            engine, loader, state, stage, store=store, meter=meter, sinks=sinks, watch=watch, rollback=rollback
        )


def stage_loader(recipe: Recipe, name: str, stage: Stage, *, dp_rank: int, dp: int) -> Loader:
    """The rows of a stage from its beginning. Close it after use."""
    return build_loader(
        recipe.data,
        stage,
        seed=recipe.seed,
        stage_name=name,
        dp_rank=dp_rank,
        dp_size=dp,
        vocab_size=recipe.model.vocab_size,
    )


def judge_teacher(recipe: Recipe, mesh: Mesh, evaluations: Evaluations, watch: Watch) -> None:
    """Judge the unconverted source once, if the recipe asks for it."""
    if not (recipe.evaluation.teacher and recipe.start.path and evaluations.due("teacher")):
        return
    seq_len = recipe.evaluation.seq_len or max(each.seq_len for each in recipe.stages.values())
    teacher = teacher_of(recipe.model, mesh.layout, seq_len=seq_len)
    chunks = build_chunks(teacher, mesh, precision=recipe.precision, seq_len=seq_len)
    fill_model(recipe, chunks, mesh)
    evaluations.add("teacher", chunks, mesh, tokens=0, must_stop=watch.must_stop)
    del chunks
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()


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
