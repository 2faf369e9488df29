"""layout_auto: legal layouts, most data parallelism first, the author's layout where it fits."""

from __future__ import annotations

import pytest

from parallel.layout import Layout
from sbtrain.config.load import load
from sbtrain.config.rules import check, check_world
from sbtrain.plan.auto_layout import auto_layout, fit_world


def layouts(recipe):
    return [stage.layout for stage in recipe.stages.values()]


@pytest.mark.parametrize(("name", "world_size"), [("demo", 1), ("demo", 4), ("7b_cpt", 24), ("7b_cpt", 64)])
def test_the_result_is_legal(name, world_size):
    fitted = auto_layout(load([f"recipe={name}", "dry_run=true"]), world_size)
    check(fitted)
    check_world(fitted, world_size)


def test_a_laptop_keeps_the_model_whole():
    demo = load(["recipe=demo", "dry_run=true", "layout_auto=true"])
    assert layouts(fit_world(demo, 1)) == [Layout(), Layout(), Layout()]
    # 2 rows of 512 tokens for 4 ranks: sp 2; one row of 1024 tokens: sp 4, whatever the number of heads
    assert layouts(fit_world(demo, 4)) == [Layout(sp=2), Layout(pp=2), Layout(sp=4)]


def test_layouts_that_fit_stay():
    recipe = load(["recipe=7b_cpt", "dry_run=true", "layout_auto=true"])
    assert layouts(fit_world(recipe, 256)) == layouts(recipe)


def test_memory_decides_where_it_is_known():
    args = ["recipe=7b_cpt", "dry_run=true", "layout_auto=true", "~stages.ctx_32k", "~stages.ctx_8k"]
    small = load([*args, "stages.ctx_128k.layout.sp=16", "cluster.memory_gib=80"])
    (layout,) = layouts(fit_world(small, 8))
    assert layout.tp * layout.pp > 1 and layout.model_ranks <= 8
    big = load([*args, "stages.ctx_128k.layout.sp=16", "cluster.memory_gib=1000"])
    assert layouts(fit_world(big, 8)) == [Layout()]


def test_held_out_rows_fit_the_chosen_layout():
    """One row a step leaves no dp; sp 2 would be next, but cannot cut held-out rows of 63 tokens."""
    args = ["recipe=demo", "dry_run=true", "layout_auto=true", "~stages.ctx_512", "~stages.ctx_1024"]
    args += ["stages.ctx_256.micro_batch=1", "stages.ctx_256.global_batch_tokens=256"]
    assert layouts(fit_world(load(args), 2)) == [Layout(sp=2)]
    assert layouts(fit_world(load([*args, "evaluation.seq_len=63"]), 2)) == [Layout(pp=2)]


def test_copies_of_experts_need_experts_on_other_ranks():
    """Without a rule the kindest layout has ep 1, in which max_copies copies nothing."""
    args = ["recipe=moe_demo", "dry_run=true", "layout_auto=true", "cluster.memory_gib=80"]
    recipe = load([*args, "stages.ctx_256.layout.ep=4", "stages.ctx_256.experts.max_copies=1"])
    fitted = auto_layout(recipe, 2)
    check(fitted)
    assert layouts(fitted)[0].ep == 2


def test_refusals():
    args = ["recipe=7b_cpt", "dry_run=true", "layout_auto=true", "stages.ctx_8k.layout.sp=16"]
    with pytest.raises(ValueError, match="stages.ctx_8k: no layout of 8 ranks fits into 4 GiB a GPU"):
        fit_world(load([*args, "cluster.memory_gib=4"]), 8)
    with pytest.raises(ValueError, match="stages.ctx_8k: no layout of 31 ranks is legal for 512 rows of 8192"):
        fit_world(load(args), 31)
    with pytest.raises(ValueError, match="stages.ctx_512: .* the smallest world that fits all stages is 2"):
        fit_world(load(["recipe=demo", "dry_run=true"]), 1)


def test_experts_are_spread_where_the_model_does_not_fit():
    args = ["recipe=76b_cpt", "dry_run=true", "layout_auto=true", "~stages.ctx_32k", "~stages.ctx_128k"]
    (layout,) = layouts(fit_world(load([*args, "stages.ctx_8k.layout.pp=3"]), 64))
    assert 1 < layout.ep <= 8 and layout.pp * layout.tp * layout.sp <= 64
