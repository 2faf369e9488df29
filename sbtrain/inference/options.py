"""key=value arguments, split at the first =, into frozen dataclasses that say which keys there are."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

Options = TypeVar("Options")


def split(arguments: Sequence[str]) -> dict[str, str]:
    """{key: value}, values literal. Raises ValueError for an argument without = and for a key given twice."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} is no option; write key=value")
        if key in given:
            raise ValueError(f"{key}= is given more than once; keep one of them")
        given[key] = value
    return given


def check_keys(given: dict[str, str], *kinds: type) -> None:
    """Raise ValueError for a key that no field of the dataclasses `kinds` has."""
    known = [field.name for kind in kinds for field in fields(kind)]
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            question = f"did you mean {nearest[0]}=? " if nearest else ""
            raise ValueError(f"{key}= is not known here; {question}There are: {', '.join(dict.fromkeys(known))}")


def build(kind: type[Options], given: dict[str, str]) -> Options:
    """An instance of a dataclass from the keys that are its fields; others are left to other dataclasses.

    Fields are str, int, float, bool, one of these or None, or tuples of them (separated by commas). Raises ValueError
    naming the key for a value that is not of its type, and for a field without default that is not given.
    """
    hints, values = typing.get_type_hints(kind), {}
    for field in fields(kind):
        if field.name in given:
            values[field.name] = _parse(field.name, given[field.name], hints[field.name])
        elif field.default is MISSING:
            raise ValueError(f"{field.name}= is missing; write {field.name}=VALUE")
    return kind(**values)


def _parse(key: str, text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_parse(key, part.strip(), item) for part in text.split(",") if part.strip())
    if type(None) in typing.get_args(kind):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{key}={text} must be true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        word = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{key}={text} is not {word}") from None
