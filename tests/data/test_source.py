"""A corpus opens whole or not at all: each kind of damage is one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sbtrain.data.source import open_corpus
from tiny_corpus import VOCAB_SIZE, write_corpus

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 0]]


@pytest.fixture
def prefix(tmp_path):
    return write_corpus(tmp_path / "c", DOCUMENTS, tokenizer_sha256="abc")


def test_reads_what_was_written(prefix):
    corpus = open_corpus(prefix, name="n", vocab_size=VOCAB_SIZE, tokenizer_sha256="abc")
    assert (corpus.num_documents, corpus.num_tokens, corpus.eos_id, corpus.name) == (3, 9, 0, "n")
    assert [corpus.read(n, 0, len(d)).tolist() for n, d in enumerate(DOCUMENTS)] == DOCUMENTS
    assert corpus.read(0, 1, 3).tolist() == [6, 7]
    assert corpus.read(0, 1, 3).dtype == np.int64


def _cut(path, num_bytes):
    Path(path).write_bytes(Path(path).read_bytes()[:-num_bytes])


def _edit(prefix, **changes):
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _spoil_pointers(prefix):
    path = Path(f"{prefix}.idx")
    raw = bytearray(path.read_bytes())
    raw[34 + 3 * 4 + 8 : 34 + 3 * 4 + 16] = b"\x7f" * 8  # header, three lengths, the second pointer
    path.write_bytes(raw)


DAMAGE = [
    (lambda prefix: Path(f"{prefix}.json").unlink(), r"c\.json is missing; make the corpus with launch/prepare_data"),
    (lambda prefix: Path(f"{prefix}.json").write_text("{"), r"c\.json is not valid JSON"),
    (lambda prefix: Path(f"{prefix}.json").write_text("{}"), r"c\.json lacks num_tokens"),
    (lambda prefix: Path(f"{prefix}.bin").unlink(), r"c\.bin is missing"),
    (lambda prefix: Path(f"{prefix}.idx").unlink(), r"c\.idx is missing"),
    (lambda prefix: _cut(f"{prefix}.bin", 2), r"c\.bin is truncated: 16 bytes, its \.idx promises 18"),
    (lambda prefix: _cut(f"{prefix}.idx", 1), r"c\.idx has \d+ bytes instead of \d+"),
    (lambda prefix: Path(f"{prefix}.idx").write_text("hello"), r"c\.idx is not a megatron index"),
    (lambda prefix: _edit(prefix, num_tokens=8), r"c\.idx has 9 tokens, .*c\.json says 8"),
    (lambda prefix: _edit(prefix, tokenizer_sha256="abd"), r"c\.json was made with another tokenizer"),
    (lambda prefix: _edit(prefix, vocab_size=VOCAB_SIZE + 1), r"vocabulary of 261, but model\.vocab_size is 260"),
    (lambda prefix: write_corpus(Path(prefix), [[]]), r"c\.bin is empty"),
    (lambda prefix: _spoil_pointers(prefix), r"c\.idx is corrupt: its documents do not follow one another"),
    (lambda prefix: _edit(prefix, vocab_size="260"), r"c\.json lacks vocab_size of type int"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_one_line(prefix, damage, message):
    damage(prefix)
    with pytest.raises(ValueError, match=message) as caught:
        open_corpus(prefix, vocab_size=VOCAB_SIZE, tokenizer_sha256="abc")
    assert "\n" not in str(caught.value)


def test_impossible_ids_are_found_when_read(tmp_path):
    prefix = write_corpus(tmp_path / "c", [[5, 0], [6, VOCAB_SIZE, 0]])
    corpus = open_corpus(prefix)
    assert corpus.read(0, 0, 2).tolist() == [5, 0]
    with pytest.raises(ValueError, match=r"c\.bin is corrupt: document 1 has ids from 0 to 260, the vocabulary is 260"):
        corpus.read(1, 0, 3)
