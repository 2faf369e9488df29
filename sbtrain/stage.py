"""One stage of a run on its own layout: build, restore or start, train, judge."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.distributed as dist

from parallel.collectives import together
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.place import section
from parallel.sequence.shard import Row
from sbtrain.checkpoint.run_dir import record_start
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.config.schema import Recipe, Stage
from sbtrain.convert.calibrate import teacher_of
from sbtrain.convert.first import FirstWeights, fill_model
from sbtrain.data.loader import Loader, build_loader
from sbtrain.metrics.meter import Meter
from sbtrain.metrics.sinks import Sinks
from sbtrain.model.build import build_chunks
from sbtrain.model.flops import training_flops_per_token
from sbtrain.plan.pipeline import pipeline_table
from sbtrain.train.evaluate import Evaluations
from sbtrain.train.loop import train
from sbtrain.train.rollback import Rollback, newest_state
from sbtrain.train.watch import Watch


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
    restore = partial(newest_state, state.stage, engine, store)
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
    torch.cuda.empty_cache()  # nothing on CPUs
