"""What `dry_run=true` prints: layers, parameters, and each stage's layout, steps, memory a rank and FLOPs a token.

Arithmetic on the recipe alone: no weights, no device, no process group. The world is cluster.num_gpus.
"""

from __future__ import annotations

import torch.distributed as dist

from sbtrain.config.pattern import describe as describe_kind
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.schema import Recipe, Stage
from sbtrain.model.build import count_parameters
from sbtrain.model.flops import TRAINING_FORWARDS, active_parameters, flops_per_token, layer_parameters, parameters
from sbtrain.plan.auto_layout import fit_world
from sbtrain.plan.memory import GIB, rank_memory
from sbtrain.plan.pipeline import pipeline_table
from sbtrain.plan.table import table


def describe(recipe: Recipe) -> str:
    """The plan as text. Raises ValueError where a stage does not fit cluster.num_gpus ranks."""
    recipe = fit_world(recipe, recipe.cluster.num_gpus)
    blocks = [_title(recipe), _layer_table(recipe), _parameter_table(recipe)]
    blocks += [_stage_block(recipe, name, stage) for name, stage in recipe.stages.items()]
    return "\n\n".join(blocks)


def dry_run(recipe: Recipe) -> None:
    """Build the whole model on the meta device and print the plan, on the first rank alone. Raises as `describe`."""
    plan = describe(recipe)
    total, active = built = count_parameters(recipe.model)
    counted = sum(parameters(recipe.model).values()), active_parameters(recipe.model)
    assert built == counted, f"the model has {built} parameters (all, active), the plan counts {counted}"
    if dist.get_rank() == 0:
        short = f", {total / 1e9:.3f}B total / {active / 1e9:.3f}B active" if active < total else ""
        print(f"{plan}\n\nbuilt on the meta device: {total:,} parameters{short}", flush=True)


def _title(recipe: Recipe) -> str:
    cluster = recipe.cluster
    machine = f"{cluster.num_gpus} ranks ({cluster.name})"
    return f"{recipe.name}: {recipe.model.pattern} on {machine}, {recipe.precision.name}, into {recipe.run_dir}"


def _layer_table(recipe: Recipe) -> str:
    kinds = parse_pattern(recipe.model.pattern, recipe.model.num_layers)
    rows = [
        (str(index), kind.symbol, _mixer(recipe, describe_kind(kind)), f"{_layer_count(recipe, kind):,}")
        for index, kind in enumerate(kinds)
    ]
    return table(("layer", "kind", "mixer", "parameters"), rows, left=(1, 2))


def _mixer(recipe: Recipe, words: str) -> str:
    return words.replace("sliding window", f"sliding window of {recipe.model.window} keys")


def _layer_count(recipe: Recipe, kind) -> int:
    return sum(layer_parameters(recipe.model, kind).values())


def _parameter_table(recipe: Recipe) -> str:
    parts, always = parameters(recipe.model), ("embedding", "attention", "mlp", "norms")
    rows = [(part, f"{count:,}") for part, count in parts.items() if count or part in always]
    rows.append(("total", f"{sum(parts.values()):,}"))
    if parts["experts"]:
        rows.append(("active", f"{active_parameters(recipe.model):,}"))
    return table(("part", "parameters"), rows, left=(0,))


def _stage_block(recipe: Recipe, name: str, stage: Stage) -> str:
    layout, world_size = stage.layout, recipe.cluster.num_gpus
    dp = layout.dp(world_size)
    sizes = f"dp {dp} x tp {layout.tp} x pp {layout.pp} x sp {layout.sp}" + "".join(
        f", {name} {size}" for name, size in (("ep", layout.ep), ("vpp", layout.vpp)) if size > 1
    )
    head = (
        f"{name}: {stage.tokens:,} tokens at {stage.seq_len:,}, {sizes}\n"
        f"  {stage.num_steps:,} steps of {stage.global_batch_tokens:,} tokens = {stage.num_rows:,} rows of "
        f"{stage.micro_batch} x {stage.seq_len:,}; {stage.num_rows // dp:,} rows a step and data-parallel rank"
    )
    pipeline = [pipeline_table(recipe.model, stage, dp=dp)] if layout.pp > 1 else []
    return "\n".join([head, *pipeline, _memory_table(recipe, stage), _flops_table(recipe, stage)])


def _memory_table(recipe: Recipe, stage: Stage) -> str:
    parts = rank_memory(recipe, stage, world_size=recipe.cluster.num_gpus)
    rows = [(part, f"{size / GIB:.2f}") for part, size in parts.items()]
    rows.append(("total", f"{sum(parts.values()) / GIB:.2f}"))
    if recipe.cluster.memory_gib:
        rows.append(("of", f"{recipe.cluster.memory_gib:.2f}"))
    return table((f"memory a rank, recompute {stage.recompute.name}", "GiB"), rows, left=(0,), indent=2)


def _flops_table(recipe: Recipe, stage: Stage) -> str:
    parts = flops_per_token(recipe.model, stage.seq_len)
    total = sum(parts.values())
    rows = [(part, f"{flops / 1e6:,.2f}") for part, flops in parts.items() if flops]
    rows += [("forward", f"{total / 1e6:,.2f}"), ("training", f"{TRAINING_FORWARDS * total / 1e6:,.2f}")]
    return table(("FLOPs a token", "MFLOP"), rows, left=(0,), indent=2)
