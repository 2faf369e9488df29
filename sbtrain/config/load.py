"""Recipe names and overrides to a checked, frozen Recipe; and back to YAML. The one door to Hydra and OmegaConf.

`recipe=NAME` is recipes/NAME.yaml, `recipe=PATH.yaml` any other file, such as the resolved recipe.yaml of a run
directory, which reproduces that run. Hydra composes the groups (recipes/model, stage, data, optim, cluster); there is
no hydra.main, hence no outputs folder and no logging set-up.
"""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sbtrain.config.hf_shape import complete_shape
from sbtrain.config.rules import check
from sbtrain.config.schema import Recipe
from sbtrain.config.typed import build, plain, type_at, unknown

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(args: list[str]) -> Recipe:
    """The Recipe of `recipe=NAME [key=value ...]`, complete and checked.

    Fields of the model left open are read from start.path; run_dir becomes runs/NAME if empty. Relative paths count
    from the working directory. With dry_run=true a start.path that does not exist is no error if the shape is whole.
    Raises ValueError: one line that names the key or file and the fix.
    """
    file, overrides = _split(args)
    groups, values = _sort_overrides(overrides, file)
    config = _compose(file, groups)
    for override in values:
        _apply(config, override)
    if not config.get("name"):
        config.name = file.stem
    if not config.get("run_dir"):
        config.run_dir = f"runs/{config.name}"
    with _one_line(file):
        resolved = OmegaConf.to_container(config, resolve=True)
    recipe = build(Recipe, resolved)
    model = complete_shape(recipe.model, recipe.start.path, may_be_absent=recipe.dry_run)
    recipe = replace(recipe, model=model)
    check(recipe)
    return recipe


def save(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe as YAML, atomically; `load(["recipe=PATH"])` gives an equal Recipe."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_yaml(recipe), encoding="utf-8")
    os.replace(partial, path)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML text, every key in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(recipe)))


def recipe_names() -> list[str]:
    """Names that `recipe=` takes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _split(args: list[str]) -> tuple[Path, list[str]]:
    named = [arg.removeprefix("recipe=") for arg in args if arg.startswith("recipe=")]
    if len(named) != 1:
        problem = "is given more than once" if named else "is missing"
        raise ValueError(f"recipe=NAME {problem}; name one of: {', '.join(recipe_names())}")
    return _recipe_file(named[0]), [arg for arg in args if not arg.startswith("recipe=")]


def _recipe_file(name: str) -> Path:
    if name.endswith(".yaml") or os.sep in name:
        path = Path(name).resolve()
        if not path.is_file():
            raise ValueError(
                f"recipe={name}: there is no such file; give a recipe.yaml, or a name: {', '.join(recipe_names())}"
            )
        return path
    if name not in recipe_names():
        nearest = difflib.get_close_matches(name, recipe_names(), n=1)
        question = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(f"recipe={name} does not exist; {question}There are: {', '.join(recipe_names())}")
    return RECIPES / f"{name}.yaml"


def _sort_overrides(args: list[str], file: Path) -> tuple[list[str], list[Override]]:
    """Choices of groups (for Hydra, as text) and values (parsed); each key once."""
    groups, values, seen = [], [], set()
    for arg in args:
        override = _parse(arg)
        key = override.key_or_group + (f"@{override.package}" if override.package else "")
        if key in seen:
            raise ValueError(f"{key} is given more than once; keep one of them")
        seen.add(key)
        options = _options(override.key_or_group, file)
        if not options or (not override.package and isinstance(override.value(), dict)):
            values.append(override)
            continue
        if not override.is_delete() and override.value() not in options:
            raise ValueError(
                f"{arg}: there is no recipes/{override.key_or_group}/{override.value()}.yaml; "
                f"there are: {', '.join(options)}"
            )
        groups.append(arg)
    return groups, values


def _options(group: str, file: Path) -> list[str]:
    folders = [folder / group for folder in {RECIPES, file.parent}]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _parse(arg: str) -> Override:
    key, equals, value = arg.partition("=")
    if not equals and not arg.startswith("~"):
        raise ValueError(f"{arg} is not an override; write key=value")
    if any(name[:1].isdigit() for name in _names_in(key)):
        raise ValueError(f"{arg}: names do not begin with a digit; name a stage for example ctx_8k")
    try:
        override = OverridesParser.create().parse_override(arg)
    except HydraException:
        override = None
    if override is None or override.is_sweep_override():
        quoted = value.replace('"', '\\"')
        raise ValueError(f"{arg} needs quotes around its value; write '{key}=\"{quoted}\"'")
    return override


def _names_in(key: str) -> list[str]:
    """The parts of a dotted key that are names: not the numbers by which some mappings have their entries."""
    names = key.lstrip("+~").split(".")
    try:
        parent = type_at(Recipe, ".".join(names[:-1])) if names[1:] else Recipe
    except ValueError:
        return names
    numbered = typing.get_origin(parent) is dict and typing.get_args(parent)[0] is int
    return names[:-1] if numbered else names


def _compose(file: Path, groups: list[str]) -> DictConfig:
    """The file with its groups, untyped. A group that the file does not mention is appended to it."""
    search = f'hydra.searchpath=["file://{RECIPES}"]'
    with _one_line(file), initialize_config_dir(config_dir=str(file.parent), version_base="1.3"):
        config = compose(config_name=file.name, overrides=[search])
        chosen: list[str] = []
        for group in groups:
            try:
                config = compose(config_name=file.name, overrides=[search, *chosen, group])
                chosen.append(group)
            except ConfigCompositionException as error:
                if "Could not override" not in str(error):
                    raise
                chosen.append(f"+{group}")
                config = compose(config_name=file.name, overrides=[search, *chosen])
    return OmegaConf.create(OmegaConf.to_container(config))  # without Hydra's flags


def _apply(config: DictConfig, override: Override) -> None:
    """Set or remove one key. Entries of mappings of blocks (stages, data.sources) appear only with a leading +."""
    key = override.key_or_group
    type_at(Recipe, key)
    if override.is_delete():
        _remove(config, key)
        return
    value = override.value()
    if value == {}:
        raise ValueError(f"{key}={{}} changes nothing; remove entries by name, ~{key}.NAME")
    _check_entries(config, key, may_add=override.is_add() or override.is_force_add())
    _make_parents(config, key.rpartition(".")[0])
    OmegaConf.update(config, key, value, merge=True)


def _remove(config: DictConfig, key: str) -> None:
    parent, _, name = key.rpartition(".")
    if typing.get_origin(type_at(Recipe, parent) if parent else Recipe) is not dict:
        raise ValueError(
            f"~{key}: only entries of stages, data.sources, blend and ops can be removed; write {key}=VALUE"
        )
    entries = OmegaConf.select(config, parent) or {}
    if name not in entries:
        raise unknown(key, list(entries))
    del entries[name]


def _check_entries(config: DictConfig, key: str, *, may_add: bool) -> None:
    names = key.split(".")
    for depth in range(1, len(names)):
        parent = ".".join(names[:depth])
        kind = type_at(Recipe, parent)
        is_blocks = typing.get_origin(kind) is dict and is_dataclass(typing.get_args(kind)[1])
        entries = list(OmegaConf.select(config, parent) or {}) if is_blocks else []
        if is_blocks and not may_add and names[depth] not in entries:
            raise ValueError(
                f"{parent}.{names[depth]} does not exist (there are: {', '.join(entries) or 'none'}); "
                f"to add it write +{key}=VALUE"
            )


def _make_parents(config: DictConfig, parent: str) -> None:
    """Turn missing or null blocks above a key into mappings, as Hydra's `++` does only for missing ones."""
    names = parent.split(".") if parent else []
    for depth in range(1, len(names) + 1):
        path = ".".join(names[:depth])
        if OmegaConf.select(config, path) is None:
            OmegaConf.update(config, path, {}, force_add=True)


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """What Hydra, OmegaConf and the YAML reader raise, as one ValueError line that names the file."""
    try:
        yield
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name if mark.name != '<file>' else file}, line {mark.line + 1}" if mark else file
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{where}: not valid YAML ({' '.join(str(problem).split())}); correct that line") from None
    except (HydraException, OmegaConfBaseException, OSError) as error:
        text: Any = str(error).partition("Config search path")[0]
        raise ValueError(f"{file}: {' '.join(text.split())}; correct the file") from None
