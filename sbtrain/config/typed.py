"""Plain mappings into dataclasses, strictly: every unknown key or wrong type is one line that names the full key.

OmegaConf's structured configs are not used for this: they turn frozen dataclasses into read-only nodes that Hydra
cannot compose into, and their messages name neither the neighbor of a typo nor the quotes that a value needs.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any


def build(kind: type, value: Any, key: str = "") -> Any:
    """`value` (what YAML gives) as an instance of `kind`: dataclass, Dict, Tuple, Optional, Enum or a plain type.

    An int is taken where a float is wanted, and nothing else is converted. Raises ValueError naming `key`.
    """
    kind, optional = _strip_optional(kind)
    if value is None and optional:
        return None
    if is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    if typing.get_origin(kind) is dict:
        named, entry = typing.get_args(kind)
        read, entries = _number if named is int else _name, _mapping(value, key)
        names = [read(name, key) for name in entries]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{key}.{twice} is given more than once; keep one of them")
        return {name: build(entry, item, f"{key}.{name}") for name, item in zip(names, entries.values())}
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}={value!r} is not {_wanted(kind)}; write for example '{key}=[8,7]'")
        return tuple(build(typing.get_args(kind)[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if issubclass(kind, Enum):
        return _member(kind, value, key)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{key}={value!r} is not {_wanted(kind)}; {_hint(kind, value, key)}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{key}={value} is not a finite number; {_hint(kind, value, key)}")
    return value


def plain(value: Any) -> Any:
    """The inverse of `build`: dataclasses as dicts, tuples as lists, enum members as their names."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def type_at(kind: type, key: str) -> type:
    """Type of the dotted `key` inside `kind`. Names of Dict entries are not checked. ValueError if it cannot exist."""
    path = ""
    for name in key.split("."):
        kind, _ = _strip_optional(kind)
        path = f"{path}.{name}" if path else name
        if is_dataclass(kind):
            hints = hints_of(kind)
            if name not in hints:
                raise unknown(path, list(hints))
            kind = hints[name]
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            raise ValueError(f"{path} is not a key: {path.rpartition('.')[0]} is {_wanted(kind)} and has no keys")
    return kind


def hints_of(kind: type) -> dict[str, Any]:
    """Field name -> type of a dataclass, in order."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def default_of(field: Field) -> Any:
    """The default of a dataclass field (built, where it is a factory)."""
    return field.default if field.default is not MISSING else field.default_factory()


def unknown(key: str, known: list[str]) -> ValueError:
    """The error for `key`, whose last part is none of `known`: with the nearest, else with all of them."""
    prefix, dot, name = key.rpartition(".")
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    advice = f"did you mean {prefix}{dot}{nearest[0]}?" if nearest else f"it may be one of: {', '.join(known) or '-'}"
    return ValueError(f"{key} is not a key of the recipe; {advice}")


def _build_dataclass(kind: type, value: Any, key: str) -> Any:
    entries = _mapping(value, key)
    hints = hints_of(kind)
    given = {}
    for name, item in entries.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise unknown(path, list(hints))
        given[name] = build(hints[name], item, path)
    return kind(**given)


def _strip_optional(kind: Any) -> tuple[Any, bool]:
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    return next(part for part in typing.get_args(kind) if part is not type(None)), True


def _mapping(value: Any, key: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{key or 'the recipe'} is {value!r} but holds keys; give them as {key}.KEY=VALUE")
    return value


def _name(name: Any, key: str) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{key}: {name!r} is not a name; use letters, digits and _, not a digit first (ctx_8k)")
    return name


def _number(name: Any, key: str) -> int:
    """A key that is an integer; YAML gives one, the command line its digits."""
    if isinstance(name, bool) or not str(name).isdecimal():
        raise ValueError(f"{key}: {name!r} is not a number; write for example '{key}={{3: 2.5}}'")
    return int(name)


def _member(kind: type[Enum], value: Any, key: str) -> Enum:
    members = [member.name for member in kind]
    if value not in members:
        raise ValueError(f"{key}={value!r} is not a choice; it is one of: {', '.join(members)}")
    return kind[value]


def _wanted(kind: type) -> str:
    if typing.get_origin(kind) is tuple:
        return "a list"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(kind, kind.__name__)


def _hint(kind: type, value: Any, key: str) -> str:
    if kind is int and isinstance(value, float) and value == int(value):
        return f"write {int(value):_}"
    if kind is str and not isinstance(value, (dict, list)):
        return f"quote it: '{key}=\"{value}\"'"
    examples = {int: "write for example 8192 or 100_000_000", float: "write for example 0.1 or 3e-5", bool: "write one"}
    return examples.get(kind, "write text")
