"""The pattern grammar: what it means, and where it points when it is broken."""

from __future__ import annotations

import pytest

from sbtrain.config.pattern import LayerKind, describe, parse_pattern


def symbols(pattern: str, num_layers: int) -> str:
    return " ".join(kind.symbol for kind in parse_pattern(pattern, num_layers))


@pytest.mark.parametrize(
    ("pattern", "num_layers", "expected"),
    [
        ("F", 3, "F F F"),
        ("LS", 4, "L S L S"),
        ("LS x 2", 4, "L S L S"),
        ("LS x 2", 8, "L S L S L S L S"),
        ("  L   S ", 2, "L S"),
        ("LLS x 2 F", 7, "L L S L L S F"),
        ("F x 2 L S x 2", 5, "F F L S S"),
        ("(LS) x 2 (LF)", 3, "(LS) (LS) (LF)"),
        ("L(LS)S", 3, "L (LS) S"),
        ("L:m S", 2, "L:m S"),
        ("(LS):mF x 2", 4, "(LS):m F (LS):m F"),
        ("B E", 2, "B E"),
    ],
)
def test_meaning(pattern, num_layers, expected):
    assert symbols(pattern, num_layers) == expected


def test_7b_pattern_is_gla_on_even_and_window_on_odd_layers():
    kinds = parse_pattern("LS x 14", 28)
    assert [kind.mixers for kind in kinds[::2]] == [("L",)] * 14 and [kind.mixers for kind in kinds[1::2]] == [
        ("S",)
    ] * 14


def test_a_pair_with_experts():
    assert parse_pattern("(LS):m", 1) == (LayerKind(("L", "S"), moe=True),)
    assert describe(LayerKind(("L", "S"), moe=True)) == "gated linear attention + sliding window, mixture of experts"
    assert describe(LayerKind(("F",))) == "full attention"


@pytest.mark.parametrize(
    ("pattern", "num_layers", "expected"),
    [
        ("LZS", 3, "'Z' at position 2 is not a layer"),
        ("L sS", 3, "'s' at position 3 is not part of a layer"),
        ("F (LS", 2, "'(' at position 3 is not part"),
        ("(L)", 1, "'(' at position 1"),
        ("F (LZ)", 2, "'Z' at position 5 is not a layer"),
        ("F (LL)", 2, "'L' at position 5 repeats its partner"),
        ("L:S", 2, "':' at position 2"),
        (":m", 2, "':' at position 1"),
        ("L14", 14, "'1' at position 2"),
        ("x 2", 2, "'x' at position 1 repeats nothing"),
        ("L x", 2, "'x' at position 3 needs a number"),
        ("L x S", 2, "'S' at position 5 must be a number"),
        ("L x 0", 2, "'0' at position 5 must be a number of repeats, 1 or more"),
        ("L x2", 2, "'x' at position 3"),
        ("", 2, "model.pattern is empty"),
        ("LS x 13", 28, "gives 26 layers, which does not fit model.num_layers=28"),
        ("LS x 3", 4, "gives 6 layers, which does not fit model.num_layers=4"),
    ],
)
def test_errors_name_character_and_position(pattern, num_layers, expected):
    with pytest.raises(ValueError) as caught:
        parse_pattern(pattern, num_layers)
    text = str(caught.value)
    assert "model.pattern" in text and expected in text and "\n" not in text
