"""docs/recipe.md, from the docstrings of the recipe's dataclasses.

To write it: `python -m sbtrain.plan.recipe_page > docs/recipe.md`.

A docstring line `name: meaning` (continued by deeper indentation) describes the field of that name. A test compares
the page with the file, so it cannot drift.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from typing import Any

from sbtrain.config.schema import Recipe
from sbtrain.config.typed import default_of, hints_of, plain

HEAD = """# Every key of a recipe

Generated from `sbtrain/config/schema.py` and `model_schema.py`: `python -m sbtrain.plan.recipe_page > docs/recipe.md`.

A recipe is `recipes/NAME.yaml`, composed of the groups `recipes/{model,stage,data,optim,cluster}/`, or the resolved
`recipe.yaml` of a run directory: `recipe=NAME` or `recipe=PATH.yaml`. Every key below can be given on the command line
as `key=value`, a group as `cluster=h200x8`. Relative paths count from the working directory.

- Token counts are integers: `stages.ctx_8k.tokens=100_000_000_000`.
- Values with parentheses, commas or `=` need Hydra's quotes inside the shell's: `'model.pattern="(LS) x 14"'`.
- Entries of `stages` and `data.sources` are added with `+` (`+data.sources.books.path=PREFIX`) and removed with `~`
  (`~stages.ctx_128k`). Stages run in the order of the YAML; names do not begin with a digit.
- `null` means: not given.
"""


def recipe_page() -> str:
    """The page as Markdown."""
    return HEAD + "".join(_sections(Recipe, ""))


def field_texts(kind: type) -> dict[str, str]:
    """Field name -> its line of the class docstring, joined. Fields without a line are absent."""
    names = {field.name for field in fields(kind)}
    texts: dict[str, str] = {}
    current = ""
    for line in inspect.getdoc(kind).splitlines():
        match = re.match(r"(\w+): (.*)", line)
        if match and match.group(1) in names:
            current = match.group(1)
            texts[current] = match.group(2)
        elif current and line.startswith("    "):
            texts[current] += " " + line.strip()
        else:
            current = ""
    return texts


def _sections(kind: type, prefix: str) -> list[str]:
    """The section of one dataclass, then those nested in it, depth first."""
    summary = inspect.getdoc(kind).split("\n\n")[0].replace("\n", " ")
    texts, rows, nested = field_texts(kind), [], []
    for field in fields(kind):
        hint = hints_of(kind)[field.name]
        inner, key = _block(hint), f"{prefix}{field.name}"
        rows.append(f"| `{key}` | {_type_text(hint)} | {_default_text(field)} | {texts.get(field.name, '')} |\n")
        if inner:
            named = ".NAME" if typing.get_origin(hint) is dict else ""
            nested += _sections(inner, f"{key}{named}.")
    title = f"`{prefix[:-1]}`" if prefix else "The recipe"
    table = ["| key | type | default | meaning |\n|---|---|---|---|\n", *rows]
    return [f"\n## {title}\n\n{summary}\n\n", *table, *nested]


def _block(hint: Any) -> type | None:
    """The dataclass inside a type, if there is one."""
    parts = [hint, *typing.get_args(hint)]
    return next((part for part in parts if is_dataclass(part)), None)


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is dict:
        return f"mapping of {_type_text(typing.get_args(hint)[1])}"
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_text(typing.get_args(hint)[0])}s"
    kind = next((part for part in (*typing.get_args(hint), hint) if part is not type(None)), hint)
    if is_dataclass(kind):
        return "block"
    if issubclass(kind, Enum):
        return ", ".join(f"`{member.name}`" for member in kind)
    return {int: "integer", float: "number", bool: "true or false", str: "text"}[kind]


def _default_text(field: Field) -> str:
    value = plain(default_of(field))
    if isinstance(value, dict):
        return ""
    return {None: "`null`", True: "`true`", False: "`false`", "": "empty"}.get(
        value if isinstance(value, (bool, str, type(None))) else ..., f"`{value}`"
    )


if __name__ == "__main__":
    sys.stdout.write(recipe_page())
