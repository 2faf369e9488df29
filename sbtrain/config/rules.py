"""What a single field cannot know: rules across the fields of a recipe, one small function each.

`check` runs all that need no world size (`load` calls it). `check_world` adds what torchrun's world size decides, and
`check_training` what only a training run reads.
`layout_problem` gives the layout rules of one stage as text, for whoever searches layouts.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path

import ops
from parallel.layout import Layout
from parallel.sequence.table import pair_problem
from sbtrain.config.checkpoint_rules import check_checkpoint
from sbtrain.config.export_shape import is_export
from sbtrain.config.hf_shape import read_config
from sbtrain.config.mixer_rules import check_shape, cut_problem, teacher_cut_problem
from sbtrain.config.moe_rules import check_moe, experts_problem, ranks_problem
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.schema import Decay, ModelConfig, Objective, Recipe, Stage
from sbtrain.config.spiking_rules import check_spiking
from sbtrain.config.watch_rules import check_runtime, check_watch

TRAINABLE_MIXERS = ("F", "S", "L")
TRAINABLE_PAIRS = ("(LS)", "(LF)")
OBJECTIVES = (Objective.ce,)
LARGEST_WORLD = 65536
"""Where the search for a world size that fits ends."""


def check(recipe: Recipe) -> None:
    """All rules that hold for any world. Raises ValueError: one line with the key and the fix."""
    check_shape(recipe.model)
    check_pattern(recipe.model)
    check_moe(recipe.model)
    check_spiking(recipe.model)
    check_start(recipe)
    check_optim(recipe)
    check_counts(recipe)
    check_watch(recipe.watch)
    check_runtime(recipe.runtime)
    check_sources(recipe)
    check_ops(recipe)
    if not recipe.stages:
        raise ValueError("stages is empty; a recipe needs at least one, such as stage@stages.ctx_8k: 8k")
    if recipe.stop_after and recipe.stop_after not in recipe.stages:
        raise ValueError(f"stop_after={recipe.stop_after} is no stage; it is one of: {', '.join(recipe.stages)}")
    for name, stage in recipe.stages.items():
        check_budget(name, stage)
        check_objective(name, stage)
        check_schedule(name, stage)
        check_blend(recipe, name, stage)
        problem = layout_problem(recipe.model, stage, stage.layout) or experts_problem(recipe.model, stage)
        if problem:
            raise ValueError(f"stages.{name}.{problem}")
        check_evaluation(recipe, name, stage.layout)


def check_training(recipe: Recipe) -> None:
    """What training reads and a plan or a conversion does not. Raises ValueError naming the key."""
    if not recipe.data.sources:
        raise ValueError("data.sources is empty; add a corpus: +data.sources.NAME.path=PREFIX (see prepare_data)")
    if not recipe.data.tokenizer:
        raise ValueError("data.tokenizer is empty; give the folder with the tokenizer.json that made the corpora")


def check_world(recipe: Recipe, world_size: int) -> None:
    """Every stage must fit `world_size` ranks, batch included. The refusal names the smallest world that fits."""
    for name, stage in recipe.stages.items():
        problem = world_problem(stage, world_size)
        if problem:
            smallest = smallest_world(recipe)
            fits = f"the smallest world that fits all stages is {smallest}"
            none = "no world fits all stages as they are"
            raise ValueError(f"stages.{name}: {problem}; {fits if smallest else none}, or set layout_auto=true")
        check_evaluation(recipe, name, stage.layout)


def smallest_world(recipe: Recipe) -> int | None:
    """The smallest number of ranks that every stage can run on, or None."""
    step = math.lcm(*(stage.layout.model_ranks for stage in recipe.stages.values()))
    for world_size in range(step, LARGEST_WORLD + 1, step):
        if not any(world_problem(stage, world_size) for stage in recipe.stages.values()):
            return world_size
    return None


def world_problem(stage: Stage, world_size: int) -> str | None:
    """Why this stage cannot run on `world_size` ranks, or None."""
    layout = stage.layout
    ranks = f"layout tp {layout.tp} x pp {layout.pp} x sp {layout.sp} = {layout.model_ranks} ranks"
    if world_size % layout.model_ranks:
        return f"{ranks} do not divide the world of {world_size}"
    dp = world_size // layout.model_ranks
    if world_size // layout.pp % layout.ep:
        return (
            f"layout ep {layout.ep} does not divide the {world_size // layout.pp} ranks of a pipeline stage, "
            f"dp {dp} x sp {layout.sp} x tp {layout.tp}"
        )
    if stage.num_rows % dp:
        return (
            f"global_batch_tokens={stage.global_batch_tokens} are {stage.num_rows} rows of micro_batch x seq_len = "
            f"{stage.row_tokens} tokens, which dp {dp} (a world of {world_size}) does not divide"
        )
    num_rows = stage.num_rows // dp
    if layout.vpp > 1 and num_rows % layout.pp:
        return (
            f"layout.vpp={layout.vpp} takes rows pp={layout.pp} at a time, and global_batch_tokens="
            f"{stage.global_batch_tokens} are {num_rows} rows a data-parallel rank (dp {dp}); set layout.vpp=1 or make "
            "them a multiple of pp"
        )
    return None


def layout_problem(model: ModelConfig, stage: Stage, layout: Layout) -> str | None:
    """Why this stage of this model cannot use `layout` on any world (begins with `layout.`), or None."""
    return (
        _rank_problem(layout)
        or _tensor_problem(model, layout)
        or _pipeline_problem(model, layout)
        or ranks_problem(model, layout)
        or _sequence_problem(model, stage, layout)
    )


def algorithm_problem(model: ModelConfig, layout: Layout, *, seq_len: int) -> str | None:
    """Why layout.sp_algorithm cannot carry the model's mixers over layout.sp (begins with `layout.`), or None."""
    mixers = {symbol for kind in parse_pattern(model.pattern, model.num_layers) for symbol in kind.mixers}
    sizes = dict(sp=layout.sp, num_kv_heads=model.num_kv_heads // layout.tp, window=model.window, seq_len=seq_len)
    for symbol in TRAINABLE_MIXERS:
        problem = pair_problem(symbol, getattr(layout.sp_algorithm, symbol), **sizes) if symbol in mixers else None
        if problem:
            return problem
    return None


def check_pattern(model: ModelConfig) -> None:
    """The pattern parses, fits num_layers and holds only layers that can be trained."""
    for index, kind in enumerate(parse_pattern(model.pattern, model.num_layers)):
        if kind.symbol.removesuffix(":m") not in (*TRAINABLE_MIXERS, *TRAINABLE_PAIRS):
            raise ValueError(
                f"model.pattern '{model.pattern}': layer {index} is {kind.symbol}, which is not trainable yet; "
                f"use {', '.join((*TRAINABLE_MIXERS, *TRAINABLE_PAIRS))}"
            )


def check_start(recipe: Recipe) -> None:
    """A given start.path exists, except in a dry run, which reads no weights."""
    path = recipe.start.path
    if path and not recipe.dry_run and not Path(path).is_dir():
        raise ValueError(f"start.path={path} does not exist; put the Hugging Face folder there or set start.path")
    if path and recipe.evaluation.teacher and Path(path).is_dir() and is_export(read_config(path)):
        raise ValueError(
            f"evaluation.teacher=true: start.path={path} is an export of sbtrain, which has no teacher; set false"
        )


def check_optim(recipe: Recipe) -> None:
    """AdamW's numbers are in their ranges."""
    optim = recipe.optim
    for field in ("beta1", "beta2"):
        if not 0 <= getattr(optim, field) < 1:
            raise ValueError(f"optim.{field}={getattr(optim, field)} must be at least 0 and less than 1")
    for field in ("weight_decay", "clip_grad", "new_lr_scale"):
        if getattr(optim, field) < 0:
            raise ValueError(f"optim.{field}={getattr(optim, field)} is negative; give 0 or more")
    if optim.eps <= 0:
        raise ValueError(f"optim.eps={optim.eps} must be greater than 0")


def check_evaluation(recipe: Recipe, name: str, layout: Layout) -> None:
    """Held-out rows are judged on every stage's layout, which must be able to cut them."""
    problem = evaluation_problem(recipe, layout)
    if problem:
        raise ValueError(f"evaluation.seq_len: {problem} of stages.{name}.layout; give a multiple of them")


def evaluation_problem(recipe: Recipe, layout: Layout) -> str | None:
    """Why held-out rows cannot be judged on a layout, or None. Without evaluation.seq_len the longest stage counts."""
    seq_len = recipe.evaluation.seq_len or max(stage.seq_len for stage in recipe.stages.values())
    if recipe.evaluation.tokens <= 0:
        return None
    problem, teacher = cut_problem(recipe.model, layout, row_tokens=seq_len), ""
    if not problem and recipe.evaluation.teacher and recipe.start.path:
        problem, teacher = teacher_cut_problem(recipe.model, layout, row_tokens=seq_len), " of the teacher"
    return problem and f"{seq_len} tokens{teacher}{problem}"


def check_ops(recipe: Recipe) -> None:
    """`ops:` names ops that exist. Whether this machine has the backend is seen when the run starts."""
    known = list(ops.scan())
    for op in recipe.ops:
        if op not in known:
            nearest = difflib.get_close_matches(op, known, n=1)
            advice = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(known)}"
            raise ValueError(f"ops.{op}: there is no such op; {advice}")


def check_counts(recipe: Recipe) -> None:
    """Counts and intervals outside of the stages."""
    least = {
        "seed": (recipe.seed, 0),
        "log.every_steps": (recipe.log.every_steps, 1),
        "evaluation.tokens": (recipe.evaluation.tokens, 0),
        "evaluation.seq_len": (recipe.evaluation.seq_len, 0),
        "cluster.num_gpus": (recipe.cluster.num_gpus, 1),
        "cluster.gpus_per_node": (recipe.cluster.gpus_per_node, 1),
        "cluster.peak_tflops": (recipe.cluster.peak_tflops, 0),
        "cluster.memory_gib": (recipe.cluster.memory_gib, 0),
    }
    for key, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"{key}={value} is too small; give {smallest} or more")
    check_checkpoint(recipe.checkpoint)
    modes = ("offline", "online", "disabled")
    if recipe.log.wandb_mode not in modes:
        raise ValueError(f"log.wandb_mode={recipe.log.wandb_mode} is not a choice; it is one of: {', '.join(modes)}")


def check_sources(recipe: Recipe) -> None:
    """Weights make a blend, no corpus is listed twice, and an evaluation has text to read."""
    sources = recipe.data.sources
    _check_weights("data.sources", {name: source.weight for name, source in sources.items()}, ".weight")
    first: dict[str, str] = {}
    for name, source in sources.items():
        if not source.path:
            raise ValueError(f"data.sources.{name}.path is empty; give the prefix that prepare_data wrote")
        other = first.setdefault(source.path, name)
        if other != name:
            raise ValueError(
                f"data.sources.{name}.path={source.path} is already the path of {other}; remove one, or add the weights"
            )
    if recipe.evaluation.tokens and not any(source.valid for source in sources.values()):
        raise ValueError("evaluation.tokens is set but no data source has held-out text; give data.sources.NAME.valid")


def check_budget(name: str, stage: Stage) -> None:
    """Lengths and budgets are positive, whole rows make a batch, and the budget holds at least one step."""
    for field in ("seq_len", "micro_batch", "global_batch_tokens", "tokens"):
        if getattr(stage, field) < 1:
            raise ValueError(f"stages.{name}.{field}={getattr(stage, field)} must be 1 or more")
    if stage.num_nodes < 0:
        raise ValueError(f"stages.{name}.num_nodes={stage.num_nodes} must be 0 or more")
    if stage.global_batch_tokens % stage.row_tokens:
        nearest = max(1, round(stage.global_batch_tokens / stage.row_tokens)) * stage.row_tokens
        raise ValueError(
            f"stages.{name}.global_batch_tokens={stage.global_batch_tokens} is no multiple of seq_len x micro_batch = "
            f"{stage.seq_len} x {stage.micro_batch} = {stage.row_tokens}; the nearest is {nearest}"
        )
    if stage.tokens < stage.global_batch_tokens:
        raise ValueError(
            f"stages.{name}.tokens={stage.tokens} is less than one step of global_batch_tokens="
            f"{stage.global_batch_tokens}; raise the one or lower the other"
        )


def check_objective(name: str, stage: Stage) -> None:
    """Only what can be trained."""
    if stage.objective not in OBJECTIVES:
        available = ", ".join(objective.name for objective in OBJECTIVES)
        raise ValueError(f"stages.{name}.objective={stage.objective.name} is not available yet; available: {available}")


def check_schedule(name: str, stage: Stage) -> None:
    """Learning rates and the lengths of warmup and decay are consistent."""
    schedule, key = stage.schedule, f"stages.{name}.schedule"
    for field in ("lr", "min_lr", "warmup_tokens"):
        if getattr(schedule, field) < 0:
            raise ValueError(f"{key}.{field}={getattr(schedule, field)} is negative; give 0 or more")
    if schedule.min_lr > schedule.lr:
        raise ValueError(f"{key}.min_lr={schedule.min_lr} exceeds {key}.lr={schedule.lr}; lower min_lr")
    if schedule.warmup_tokens > stage.tokens:
        raise ValueError(
            f"{key}.warmup_tokens={schedule.warmup_tokens} exceeds stages.{name}.tokens={stage.tokens}; shorten it"
        )
    if not 0 <= schedule.decay_fraction <= 1:
        raise ValueError(f"{key}.decay_fraction={schedule.decay_fraction} must be between 0 and 1")
    decay_tokens = schedule.decay_fraction * stage.tokens if schedule.decay is Decay.wsd else 0
    if schedule.warmup_tokens + decay_tokens > stage.tokens:
        raise ValueError(
            f"{key}: warmup_tokens={schedule.warmup_tokens} and decay_fraction={schedule.decay_fraction} overlap in "
            f"{stage.tokens} tokens; shorten one"
        )


def check_blend(recipe: Recipe, name: str, stage: Stage) -> None:
    """A stage's blend names sources that exist, with weights that make a blend."""
    for source in stage.blend:
        if source not in recipe.data.sources:
            known = list(recipe.data.sources)
            nearest = difflib.get_close_matches(source, known, n=1)
            advice = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(known) or 'none'}"
            raise ValueError(f"stages.{name}.blend.{source} is not one of data.sources; {advice}")
    merged = {source: stage.blend.get(source, about.weight) for source, about in recipe.data.sources.items()}
    _check_weights(f"stages.{name}.blend", merged)


def _check_weights(key: str, weights: dict[str, float], suffix: str = "") -> None:
    for name, weight in weights.items():
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"{key}.{name}{suffix}={weight} is no weight; give 0 or more")
    if weights and not any(weights.values()):
        raise ValueError(f"{key}: all weights are 0; give at least one source a weight")


def _rank_problem(layout: Layout) -> str | None:
    for field in ("tp", "pp", "vpp", "ep", "sp"):
        if getattr(layout, field) < 1:
            return f"layout.{field}={getattr(layout, field)} must be 1 or more"
    return None


def _tensor_problem(model: ModelConfig, layout: Layout) -> str | None:
    if layout.tp_sequence_parallel and layout.tp == 1:
        return "layout.tp_sequence_parallel=true needs layout.tp of 2 or more; drop it or raise tp"
    for field in ("num_heads", "num_kv_heads", "ffn_size"):
        if getattr(model, field) % layout.tp:
            return f"layout.tp={layout.tp} does not divide model.{field}={getattr(model, field)}; choose a tp that does"
    if model.padded_vocab_size % layout.tp:
        return (
            f"layout.tp={layout.tp} does not divide the padded vocabulary of {model.padded_vocab_size}; "
            f"choose another tp or a model.vocab_multiple that tp divides"
        )
    return None


def _pipeline_problem(model: ModelConfig, layout: Layout) -> str | None:
    if layout.pp > model.num_layers:
        return f"layout.pp={layout.pp} exceeds model.num_layers={model.num_layers}; lower it"
    if layout.vpp > 1 and layout.pp == 1:
        return f"layout.vpp={layout.vpp} needs layout.pp of 2 or more; set vpp=1 or raise pp"
    chunks = f"layout.pp={layout.pp}" + (f" x vpp={layout.vpp}" if layout.vpp > 1 else "")
    if layout.pp * layout.vpp > model.num_layers:
        return f"{chunks} exceeds model.num_layers={model.num_layers}; lower vpp"
    return _chunks_problem(model, layout, chunks) if layout.pp_layers else None


def _chunks_problem(model: ModelConfig, layout: Layout, chunks: str) -> str | None:
    """Why layout.pp_layers does not split the layers. chunks: names what they are to be split into."""
    given = f"layout.pp_layers=[{','.join(map(str, layout.pp_layers))}]"
    if len(layout.pp_layers) != layout.pp * layout.vpp:
        wanted = layout.pp * layout.vpp
        return f"{given} has {len(layout.pp_layers)} entries; {chunks} needs {wanted}, or [] for a balanced split"
    if min(layout.pp_layers) < 1:
        return f"{given} leaves a stage without layers; give every one at least 1"
    if sum(layout.pp_layers) != model.num_layers:
        return f"{given} are {sum(layout.pp_layers)} layers, model.num_layers={model.num_layers}; make them add up"
    return None


def _sequence_problem(model: ModelConfig, stage: Stage, layout: Layout) -> str | None:
    if stage.seq_len % layout.sp:
        return f"layout.sp={layout.sp} does not divide seq_len={stage.seq_len}; choose an sp that does"
    problem = cut_problem(model, layout, row_tokens=stage.row_tokens)
    if problem:
        keys = "seq_len, micro_batch or model.meta.num_tokens" if model.meta.num_tokens else "seq_len or micro_batch"
        return (
            f"layout.sp={layout.sp} x tp={layout.tp} under tp_sequence_parallel: a row of {stage.row_tokens} "
            f"tokens{problem}; choose a {keys} that they divide"
        )
    return algorithm_problem(model, layout, seq_len=stage.seq_len)
