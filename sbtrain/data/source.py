"""A tokenized corpus on disk, opened with every check that is cheap, read document by document, each read checked."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbtrain.data.blocks import BLOCK_BYTES, Blocks, read_sums

_IDX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of document bounds: the start of a megatron .idx file."""
_MAGIC = b"MMIDIDX\x00\x00"


@dataclass(frozen=True)
class Corpus:
    """Read access to PREFIX.bin/.idx/.json.

    lengths: int32 [num_documents], tokens of each document, its eos included. num_bytes: UTF-8 bytes of the text.
    is_sealed: whether there are checksums, so that a read finds whatever has changed.
    """

    name: str
    prefix: str
    lengths: np.ndarray
    num_tokens: int
    num_bytes: int
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    is_sealed: bool
    _starts: np.ndarray
    _dtype: np.dtype
    _blocks: Blocks

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one document, int64.

        Raises ValueError naming the file where it is cut, has not its checksums, or holds impossible ids.
        """
        first, item_bytes = int(self._starts[document]), self._dtype.itemsize
        raw = self._blocks.read((first + int(start)) * item_bytes, (first + int(stop)) * item_bytes)
        tokens = np.frombuffer(raw, dtype=self._dtype).astype(np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(
                f"{self.prefix}.bin is corrupt: document {document} has ids from {tokens.min()} to {tokens.max()}, the "
                f"vocabulary is {self.vocab_size}; copy the file again or rerun prepare_data"
            )
        return tokens

    def close(self) -> None:
        """Close the file; the corpus cannot be read afterwards."""
        self._blocks.close()


def open_corpus(
    prefix: str, *, name: str = "", vocab_size: int | None = None, tokenizer_sha256: str | None = None
) -> Corpus:
    """Open the corpus that prepare_data wrote under PREFIX.

    vocab_size: of the model; tokenizer_sha256: of data.tokenizer; None skips that check. Raises ValueError, one line
    naming the file and the fix: a file is missing, empty, truncated, or of another tokenizer or vocabulary.
    """
    about = _description(Path(f"{prefix}.json"))
    lengths, dtype = _check_files(prefix)
    ends = lengths.cumsum(dtype=np.int64)
    num_tokens = int(ends[-1])
    if num_tokens != about["num_tokens"]:
        raise ValueError(
            f"{prefix}.idx has {num_tokens} tokens, {prefix}.json says {about['num_tokens']}; the files are not of one "
            "run: copy all three again or rerun prepare_data"
        )
    if tokenizer_sha256 is not None and tokenizer_sha256 != about["tokenizer_sha256"]:
        raise ValueError(
            f"{prefix}.json was made with another tokenizer.json (sha256 {about['tokenizer_sha256'][:12]}) than "
            f"data.tokenizer ({tokenizer_sha256[:12]}); rerun prepare_data with that tokenizer"
        )
    if vocab_size is not None and about["vocab_size"] > vocab_size:
        raise ValueError(
            f"{prefix}.json has a vocabulary of {about['vocab_size']}, but model.vocab_size is {vocab_size}; rerun "
            "prepare_data with the model's tokenizer"
        )
    num_bytes = num_tokens * dtype.itemsize
    sums = read_sums(prefix, about, num_bytes=num_bytes)
    block_bytes = BLOCK_BYTES if sums is None else about["checksums"]["block_bytes"]
    return Corpus(
        name=name,
        prefix=prefix,
        lengths=lengths,
        num_tokens=num_tokens,
        num_bytes=about["num_bytes"],
        vocab_size=about["vocab_size"],
        eos_id=about["eos_id"],
        tokenizer_sha256=about["tokenizer_sha256"],
        is_sealed=sums is not None,
        _starts=ends - lengths,
        _dtype=dtype,
        _blocks=Blocks(Path(f"{prefix}.bin"), num_bytes=num_bytes, sums=sums, block_bytes=block_bytes),
    )


def _description(path: Path) -> dict[str, Any]:
    keys = {"num_tokens": int, "num_bytes": int, "vocab_size": int, "eos_id": int, "tokenizer_sha256": str}
    if not path.is_file():
        raise ValueError(f"{path} is missing; make the corpus with launch/prepare_data.py out={path.with_suffix('')}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key, kind in keys.items() if not isinstance(about.get(key), kind)]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); rerun prepare_data") from error
    if missing:
        raise ValueError(f"{path} lacks {missing[0]} of type {keys[missing[0]].__name__}; rerun prepare_data")
    return about


def _check_files(prefix: str) -> tuple[np.ndarray, np.dtype]:
    """Lengths of the documents, int32, and type of a token, after checking that .idx is whole and .bin as long."""
    idx, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, binary):
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy it beside {prefix}.json or rerun prepare_data")
    with open(idx, "rb") as stream:
        header = stream.read(_IDX_HEADER.size)
        if len(header) < _IDX_HEADER.size or header[:9] != _MAGIC:
            raise ValueError(f"{idx} is not a megatron index; copy it again or rerun prepare_data")
        _, version, dtype_code, num_documents, num_bounds = _IDX_HEADER.unpack(header)
        expected = _IDX_HEADER.size + num_documents * (4 + 8) + num_bounds * 8
        if version != 1 or idx.stat().st_size != expected:
            raise ValueError(
                f"{idx} has {idx.stat().st_size} bytes instead of {expected}; copy it again or rerun prepare_data"
            )
        lengths = np.fromfile(stream, dtype=np.int32, count=num_documents)
        pointers = np.fromfile(stream, dtype=np.int64, count=num_documents)
    dtype, num_tokens = _token_type(idx, dtype_code), int(lengths.sum(dtype=np.int64))
    if num_tokens == 0:
        raise ValueError(f"{binary} is empty; rerun prepare_data with text in input=")
    starts = (lengths.cumsum(dtype=np.int64) - lengths) * dtype.itemsize
    if lengths.min() < 0 or not np.array_equal(pointers, starts):
        raise ValueError(f"{idx} is corrupt: its documents do not follow one another; copy it again")
    _check_size(binary, num_tokens * dtype.itemsize)
    return lengths, dtype


def _token_type(idx: Path, dtype_code: int) -> np.dtype:
    from parallel.mcore import DType

    try:
        return np.dtype(DType.dtype_from_code(dtype_code))
    except ValueError as error:
        raise ValueError(f"{idx} names an unknown token type {dtype_code}; rerun prepare_data") from error


def _check_size(path: Path, expected_bytes: int) -> None:
    actual_bytes = path.stat().st_size
    if actual_bytes != expected_bytes:
        kind = "truncated" if actual_bytes < expected_bytes else "too long"
        raise ValueError(
            f"{path} is {kind}: {actual_bytes} bytes, its .idx promises {expected_bytes}; copy it again or rerun "
            "prepare_data"
        )
