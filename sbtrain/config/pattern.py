"""The layer pattern: one short string that says what every layer of the decoder is.

Grammar: terms separated by spaces; a term is a unit, or `unit x N` to repeat it. A unit is a run of layers: the
symbols F (full attention), S (sliding window), L (gated linear attention), B (MoBA), E (SSE), or two of them in
parentheses, `(LS)`, for mixers that work in parallel inside one layer; `:m` after a layer makes its FFN a mixture of
experts. A pattern shorter than the model is tiled where it divides the number of layers. SpikingBrain-7B is `LS x 14`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MIXERS = {
    "F": "full attention",
    "S": "sliding window",
    "L": "gated linear attention",
    "B": "block-sparse attention (MoBA)",
    "E": "sparse state expansion (SSE)",
}
"""Symbol -> what it means, in words."""

_LAYER = re.compile(r"([A-Z]|\([A-Z]{2}\))(:m)?")
_TERM = re.compile(r"\S+")
_LEGAL = "layers are F, S, L, B, E, pairs like (LS), and :m after a layer; repeat a unit with `x N`"


@dataclass(frozen=True)
class LayerKind:
    """One layer: its mixers (one, or two in parallel) and whether its FFN is a mixture of experts."""

    mixers: tuple[str, ...]
    moe: bool = False

    @property
    def symbol(self) -> str:
        """The layer as the pattern writes it: `L`, `(LS)`, `L:m`."""
        mixers = "".join(self.mixers)
        return (mixers if len(self.mixers) == 1 else f"({mixers})") + (":m" if self.moe else "")


def describe(kind: LayerKind) -> str:
    """The layer in words: `gated linear attention + sliding window, mixture of experts`."""
    return " + ".join(MIXERS[mixer] for mixer in kind.mixers) + (", mixture of experts" if kind.moe else "")


def parse_pattern(pattern: str, num_layers: int) -> tuple[LayerKind, ...]:
    """One LayerKind a layer. Raises ValueError naming the character and its position (1-based), or the counts."""
    terms = [(match.group(), match.start()) for match in _TERM.finditer(pattern)]
    kinds: list[LayerKind] = []
    while terms:
        text, start = terms.pop(0)
        if text == "x":
            raise _error(pattern, start, "repeats nothing; write `LS x 14`")
        unit = _parse_unit(pattern, text, start)
        times = 1
        if terms and terms[0][0] == "x":
            _, at = terms.pop(0)
            times = _parse_count(pattern, terms.pop(0) if terms else None, at)
        kinds += unit * times
    if not kinds:
        raise ValueError("model.pattern is empty; write for example `LS x 14`")
    if num_layers % len(kinds):
        raise ValueError(
            f"model.pattern '{pattern}' gives {len(kinds)} layers, which does not fit model.num_layers={num_layers}; "
            "write as many layers, or a number that divides it"
        )
    return tuple(kinds * (num_layers // len(kinds)))


def _parse_unit(pattern: str, text: str, start: int) -> list[LayerKind]:
    kinds, position = [], 0
    while position < len(text):
        match = _LAYER.match(text, position)
        if not match:
            raise _error(pattern, start + position, "is not part of a layer")
        mixers = match.group(1).strip("()")
        for offset, mixer in enumerate(mixers, start=len(mixers) - 1):
            if mixer not in MIXERS:
                raise _error(pattern, start + position + offset, "is not a layer")
        if len(set(mixers)) < len(mixers):
            raise _error(pattern, start + position + 2, "repeats its partner; a pair needs two different mixers")
        kinds.append(LayerKind(tuple(mixers), moe=bool(match.group(2))))
        position = match.end()
    return kinds


def _parse_count(pattern: str, term: tuple[str, int] | None, at: int) -> int:
    if term is None:
        raise _error(pattern, at, "needs a number after it, as in `LS x 14`")
    text, start = term
    if not re.fullmatch("[1-9][0-9]*", text):
        raise _error(pattern, start, "must be a number of repeats, 1 or more")
    return int(text)


def _error(pattern: str, position: int, reason: str) -> ValueError:
    return ValueError(
        f"model.pattern '{pattern}': '{pattern[position]}' at position {position + 1} {reason} ({_LEGAL})"
    )
