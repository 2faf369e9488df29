"""docs/recipe.md is what the schema says, and the schema says something about every key."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from parallel.layout import Layout
from sbtrain.config import schema
from sbtrain.plan.recipe_page import field_texts, recipe_page

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
CLASSES = [kind for kind in vars(schema).values() if isinstance(kind, type) and is_dataclass(kind)]


def test_the_page_is_current():
    command = "python -m sbtrain.plan.recipe_page > docs/recipe.md"
    assert PAGE.read_text(encoding="utf-8") == recipe_page(), f"run: {command}"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_key_has_its_line(kind):
    assert set(field_texts(kind)) == {field.name for field in fields(kind)}


def test_nested_keys_are_written_as_a_user_types_them():
    assert Layout in CLASSES
    page = recipe_page()
    for key in ("stages.NAME.layout.tp_sequence_parallel", "model.gla.gate_rank", "data.sources.NAME.valid"):
        assert f"| `{key}` |" in page
    assert "| `stages.NAME.objective` | `ce`, `align`, `kd`, `sft` | `ce` |" in page
