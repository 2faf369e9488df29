"""Blocks: a read gives what was written or one line that names the file, also where the file changes meanwhile."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from sbtrain.data.blocks import Blocks, Sums, file_crc32
from sbtrain.data.source import open_corpus
from tiny_corpus import VOCAB_SIZE, write_corpus

BLOCK = 16


def blocks(path: Path, *, known: bool = True) -> Blocks:
    sums = Sums(BLOCK)
    sums.add(path.read_bytes())
    table = sums.table() if known else None
    return Blocks(path, num_bytes=path.stat().st_size, sums=table, block_bytes=BLOCK)


@pytest.mark.parametrize("num_bytes", [1, 15, 16, 17, 100, 160])
def test_sums_do_not_depend_on_how_the_bytes_come(num_bytes):
    data = os.urandom(num_bytes)
    whole, pieces = Sums(BLOCK), Sums(BLOCK)
    whole.add(data)
    for start in range(0, num_bytes, 7):
        pieces.add(data[start : start + 7])
    expected = [zlib.crc32(data[start : start + BLOCK]) for start in range(0, num_bytes, BLOCK)]
    assert whole.table().tolist() == pieces.table().tolist() == expected


def test_every_range_is_read(tmp_path):
    path = tmp_path / "c.bin"
    path.write_bytes(data := os.urandom(57))
    for one in (blocks(path), blocks(path, known=False)):
        assert all(one.read(start, stop) == data[start:stop] for start in range(57) for stop in range(start, 58))
        one.close()


def test_any_changed_byte_is_found_by_the_reads_of_its_block_alone(tmp_path):
    path = tmp_path / "c.bin"
    path.write_bytes(data := os.urandom(57))
    one = blocks(path)
    for place in range(57):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        first = place - place % BLOCK
        with pytest.raises(ValueError, match=rf"c\.bin is corrupt: bytes {first} to {min(first + BLOCK, 57)} have not"):
            one.read(first, first + 1)
        for other in range(0, 57, BLOCK):
            if other != first:
                assert one.read(other, other + 1) == data[other : other + 1]
    path.write_bytes(data)
    assert one.read(0, 57) == data


@pytest.mark.parametrize("known", [True, False])
def test_a_file_that_is_cut_while_it_is_read_is_one_line(tmp_path, known):
    path = tmp_path / "c.bin"
    path.write_bytes(os.urandom(57))
    one = blocks(path, known=known)
    os.truncate(path, 40)
    assert len(one.read(0, 32)) == 32
    with pytest.raises(ValueError, match=r"c\.bin is truncated: it ends at byte 40 of 57; copy the file again"):
        one.read(33, 50)


def _flip(path: str, place: int) -> None:
    raw = bytearray(Path(path).read_bytes())
    raw[place] ^= 1
    Path(path).write_bytes(raw)


DAMAGE = [
    (lambda prefix: Path(f"{prefix}.crc").unlink(), r"c\.crc is missing; copy it again"),
    (lambda prefix: _flip(f"{prefix}.crc", 0), r"c\.crc is corrupt: it has not the checksum that .*c\.json says"),
    (lambda prefix: _flip(f"{prefix}.idx", -1), r"c\.idx is corrupt: it has not the checksum that .*c\.json says"),
    (lambda prefix: _about(prefix, {}), r"c\.json: checksums has no block_bytes"),
    (lambda prefix: _longer(prefix), r"c\.crc has 2 checksums, .*c\.bin another number of blocks"),
]


def _about(prefix: str, checksums: dict) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checksums": checksums}))


def _longer(prefix: str) -> None:
    path = Path(f"{prefix}.crc")
    path.write_bytes(path.read_bytes() * 2)
    known = json.loads(Path(f"{prefix}.json").read_text())["checksums"]
    _about(prefix, known | {"crc": file_crc32(path)})


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_sums_are_one_line(tmp_path, damage, message):
    prefix = write_corpus(tmp_path / "c", [[5, 6, 0], [7, 0]], sealed=True)
    assert open_corpus(prefix).is_sealed
    damage(prefix)
    with pytest.raises(ValueError, match=message) as caught:
        open_corpus(prefix)
    assert "\n" not in str(caught.value)


def test_a_corpus_is_checked_when_it_is_read(tmp_path):
    """Ids that the vocabulary has, but not those that were written; without checksums nobody can know."""
    documents = [[*range(1, 100), 0] for _ in range(700)]  # 140,000 bytes
    for sealed in (True, False):
        prefix = write_corpus(tmp_path / "c", documents, sealed=sealed)
        corpus = open_corpus(prefix, vocab_size=VOCAB_SIZE)
        _flip(f"{prefix}.bin", 2 * 100 * 400)
        assert corpus.read(0, 0, 100).tolist() == documents[0]
        if sealed:
            with pytest.raises(ValueError, match=r"c\.bin is corrupt: bytes 65536 to 131072 have not the checksum"):
                corpus.read(400, 0, 100)
        else:
            assert corpus.read(400, 0, 3).tolist() == [0, 2, 3]
        corpus.close()
    assert np.array_equal(corpus.lengths, [100] * 700)
