"""`key=value` arguments into the frozen dataclass of a subcommand: fields are the keys, defaults the defaults."""

from __future__ import annotations

import typing
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum

ALIASES = {"pattern": "patterns"}
"""Keys that are also understood under another name: a list of one."""


def parse(kind: type, arguments: list[str]):
    """An instance of `kind` (fields of type str, int, float, bool, an Enum, or a tuple of str or int, split at commas).

    A field may be a dataclass of such fields, with a default: `experts.max_copies=1` changes that field of experts.
    Raises ValueError, one line, for what is not key=value, an unknown key (it lists all keys), a key given twice, a
    value of the wrong type, or a missing key.
    """
    types = _keys(kind)
    given = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = ALIASES.get(key, key) if ALIASES.get(key) in types else key
        if not equals or key not in types:
            raise ValueError(f"{argument!r} is not an option; the keys are: {', '.join(f'{name}=' for name in types)}")
        if key in given:
            raise ValueError(f"{key}= is given more than once; keep one of them")
        given[key] = _value(types[key], text, key)
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in given]
    if missing:
        raise ValueError(f"{missing[0]}= is missing; the keys are: {', '.join(f'{name}=' for name in types)}")
    nested = {}
    for key in [key for key in given if "." in key]:
        name, _, part = key.partition(".")
        nested.setdefault(name, {})[part] = given.pop(key)
    defaults = {field.name: field.default for field in fields(kind)}
    return kind(**given, **{name: replace(defaults[name], **parts) for name, parts in nested.items()})


def _keys(kind: type) -> dict[str, type]:
    keys = {}
    for name, of in typing.get_type_hints(kind).items():
        inner = {f"{name}.{part}": inside for part, inside in _keys(of).items()} if is_dataclass(of) else {name: of}
        keys.update(inner)
    return keys


def _value(kind, text: str, key: str):
    if typing.get_origin(kind) is tuple:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise ValueError(f"{key}={text} has an empty entry; separate entries with single commas")
        return tuple(_value(typing.get_args(kind)[0], part, key) for part in parts)
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{key}={text} is not true or false; write {key}=true")
        return text == "true"
    if issubclass(kind, Enum):
        if text not in kind.__members__:
            raise ValueError(f"{key}={text} is not a choice; it is one of: {', '.join(kind.__members__)}")
        return kind[text]
    try:
        return kind(text)
    except ValueError:
        example = "8192" if kind is int else "0.5"
        raise ValueError(f"{key}={text} is not a number; write for example {key}={example}") from None


def demand_positive(options, *names: str) -> None:
    """Raise ValueError naming the first of these integer (or tuple of integer) options that is below 1."""
    for name in names:
        value = getattr(options, name)
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 1")
