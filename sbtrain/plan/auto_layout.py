"""`layout_auto=true`: a legal layout for every stage that does not fit the world as written.

A stage whose own layout fits keeps it. Otherwise the first layout is taken that obeys all rules and, where the
cluster's memory is known, fits into 90 % of it, in this order: fewest model ranks first (most data parallelism, the
cheapest kind), then least tp x pp (sequence shards split the activations without splitting the model), then least tp,
then least ep, whose experts are cut over ranks that hold other rows anyway. Where the memory is unknown, tp, pp and ep
stay 1 as long as any such layout is legal. tp and ep stay inside one node.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from parallel.layout import Layout
from sbtrain.config.moe_rules import experts_problem
from sbtrain.config.rules import check_world, evaluation_problem, layout_problem, world_problem
from sbtrain.config.schema import Recipe, Stage
from sbtrain.model.flops import parameters
from sbtrain.plan.memory import GIB, rank_memory

USABLE_MEMORY = 0.9
"""Part of a GPU's memory that a layout may plan with; the rest is what the estimate leaves out."""


def fit_world(recipe: Recipe, world_size: int, names: list[str] | None = None) -> Recipe:
    """The recipe as `world_size` ranks run it: its layouts, or with layout_auto=true ones that fit.

    names: the stages that these ranks run; the others are left alone. None: all of them.

    Raises ValueError naming the stage and the smallest world that fits.
    """
    here = {name: stage for name, stage in recipe.stages.items() if names is None or name in names}
    fitted = replace(recipe, stages=here)
    if recipe.layout_auto:
        fitted = auto_layout(fitted, world_size)
    check_world(fitted, world_size)
    return replace(recipe, stages={**recipe.stages, **fitted.stages})


def auto_layout(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with a legal layout in every stage. Raises ValueError where a stage has none."""
    stages = {name: _fit_stage(recipe, name, stage, world_size) for name, stage in recipe.stages.items()}
    return replace(recipe, stages=stages)


def _fit_stage(recipe: Recipe, name: str, stage: Stage, world_size: int) -> Stage:
    if not world_problem(stage, world_size) and not evaluation_problem(recipe, stage.layout):
        return stage
    knows_memory = recipe.cluster.memory_gib > 0
    legal = [
        candidate
        for sizes in _sizes(recipe, world_size, model_ranks_first=knows_memory)
        if not layout_problem(recipe.model, candidate := _resized(stage, sizes), candidate.layout)
        and not experts_problem(recipe.model, candidate)
        and not world_problem(candidate, world_size)
        and not evaluation_problem(recipe, candidate.layout)
    ]
    if not legal:
        raise ValueError(
            f"stages.{name}: no layout of {world_size} ranks is legal for {stage.num_rows} rows of {stage.row_tokens} "
            f"tokens a step; change stages.{name}.global_batch_tokens or the number of ranks"
        )
    fitting = (candidate for candidate in legal if not knows_memory or _fits_memory(recipe, candidate, world_size))
    chosen = next(fitting, None)
    if chosen is None:
        raise ValueError(
            f"stages.{name}: no layout of {world_size} ranks fits into {recipe.cluster.memory_gib:g} GiB a GPU; "
            f"use more GPUs, a smaller micro_batch, or stages.{name}.recompute=full"
        )
    return chosen


def _resized(stage: Stage, sizes: Layout) -> Stage:
    """The stage on other numbers of ranks; the algorithms it asks for stay."""
    return replace(stage, layout=replace(sizes, sp_algorithm=stage.layout.sp_algorithm))


def _sizes(recipe: Recipe, world_size: int, *, model_ranks_first: bool) -> list[Layout]:
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    in_node = [n for n in divisors if n <= recipe.cluster.gpus_per_node]
    has_experts = parameters(recipe.model)["experts"] > 0
    layouts = [
        Layout(tp=tp, pp=pp, sp=sp, ep=ep)
        for tp, pp, sp, ep in product(in_node, divisors, divisors, in_node if has_experts else [1])
        if world_size % (tp * pp * sp) == 0 and (world_size // pp) % ep == 0
    ]

    def order(layout: Layout) -> tuple[int, ...]:
        split, ranks = layout.tp * layout.pp, layout.model_ranks
        return (*((ranks, split) if model_ranks_first else (split, ranks)), layout.tp, layout.ep)

    return sorted(layouts, key=order)


def _fits_memory(recipe: Recipe, stage: Stage, world_size: int) -> bool:
    needed = sum(rank_memory(recipe, stage, world_size=world_size).values())
    return needed <= USABLE_MEMORY * recipe.cluster.memory_gib * GIB
