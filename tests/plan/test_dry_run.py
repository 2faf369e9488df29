"""The text of a dry run holds the figures it promises."""

from __future__ import annotations

import pytest

from sbtrain.config.load import load
from sbtrain.config.pattern import parse_pattern
from sbtrain.plan.dry_run import describe, dry_run


def test_the_7b_plan():
    text = describe(load(["recipe=7b_cpt", "dry_run=true"]))
    lines = text.splitlines()
    assert lines[0] == "7b_cpt: LS x 14 on 256 ranks (H100), bf16, into runs/7b_cpt"
    assert any(line.split() == ["27", "S", "sliding", "window", "of", "4097", "keys", "233,057,792"] for line in lines)
    assert any(line.split() == ["0", "L", "gated", "linear", "attention", "233,123,968"] for line in lines)
    assert any(line.split() == ["total", "7,616,542,976"] for line in lines)
    assert "ctx_8k: 100,000,000,000 tokens at 8,192, dp 256 x tp 1 x pp 1 x sp 1" in lines
    assert "ctx_32k: 25,000,000,000 tokens at 32,768, dp 64 x tp 1 x pp 1 x sp 4" in lines
    assert "ctx_128k: 25,000,000,000 tokens at 131,072, dp 32 x tp 1 x pp 1 x sp 8" in lines
    assert "23,842 steps of 4,194,304 tokens" in text and "memory a rank, recompute full" in text
    assert any(line.split() == ["training", "44,324.15"] for line in lines)
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize(
    ("shared", "total", "active"),
    [
        ("false", "76,878,154,752 parameters, 76.878B", "12.717B"),
        ("true", "76,055,942,144 parameters, 76.056B", "11.895B"),
    ],
)
def test_the_76b_model_is_as_large_as_the_report_says(capfd, shared, total, active):
    """A real build without memory, which must agree with what the plan counts."""
    recipe = load(["recipe=76b_cpt", "dry_run=true", f"model.pair.shared_projections={shared}"])
    dry_run(recipe)
    assert capfd.readouterr().out.endswith(f"built on the meta device: {total} total / {active} active\n")
    kinds = parse_pattern(recipe.model.pattern, 28)
    assert [i for i, kind in enumerate(kinds) if kind.mixers == ("L", "F")] == [6, 13, 20, 27]
    assert [i for i, kind in enumerate(kinds) if not kind.moe] == [0, 1, 2, 4, 6, 8, 10]


def test_the_76b_plan():
    text = describe(load(["recipe=76b_cpt", "dry_run=true"]))
    lines = text.splitlines()
    assert "ctx_8k: 110,000,000,000 tokens at 8,192, dp 128 x tp 1 x pp 4 x sp 1, ep 8" in lines
    assert "ctx_32k: 25,000,000,000 tokens at 32,768, dp 32 x tp 1 x pp 4 x sp 4, ep 8" in lines
    assert "ctx_128k: 25,000,000,000 tokens at 131,072, dp 16 x tp 1 x pp 4 x sp 8, ep 8" in lines
    assert any(line.split() == ["total", "76,878,154,752"] for line in lines)
    assert any(line.split() == ["active", "12,717,100,032"] for line in lines)


def test_a_laptop_plan_has_no_memory_to_compare():
    text = describe(load(["recipe=demo", "dry_run=true"]))
    assert "134,703,168" in text and "\n  of " not in text


def test_a_world_that_does_not_fit_is_refused():
    recipe = load(["recipe=demo", "dry_run=true", "cluster.num_gpus=1"])
    with pytest.raises(ValueError, match="stages.ctx_512: .* is 2, or set layout_auto=true"):
        describe(recipe)
    assert "pp 1" in describe(load(["recipe=demo", "dry_run=true", "cluster.num_gpus=1", "layout_auto=true"]))
