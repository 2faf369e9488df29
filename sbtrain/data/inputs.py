"""Raw text on disk as slices: the fixed units in which a corpus is read, tokenized, and resumed.

How files are cut never depends on the number of workers. A .jsonl file is cut by bytes, a parquet file by row groups;
a compressed .jsonl is one slice (it cannot be entered in the middle), and small text files share one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPENERS = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}
_TEXT = (".txt", ".md", ".rst")
_KNOWN = (*_OPENERS, ".parquet", *_TEXT)
_HEAD_BYTES = 65536


@dataclass(frozen=True)
class Slice:
    """One unit of work. paths has one file, or several for plain text (one document a file).

    names: the files as the corpus records them, relative to the given input. identity: size and hash of both ends of
    each file. start, stop: bytes of a .jsonl, row groups of a parquet file, unused otherwise. num_bytes: on disk.
    """

    kind: str
    paths: tuple[str, ...]
    names: tuple[str, ...]
    identity: tuple[str, ...]
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    kind: str
    num_bytes: int
    identity: str


def find_slices(inputs: Sequence[str | Path], *, slice_bytes: int) -> list[Slice]:
    """Slices of files and folders (searched recursively, sorted), in reading order.

    Raises ValueError naming the file: missing, empty, of unknown kind, unreadable parquet; or a folder without text.
    """
    slices: list[Slice] = []
    texts: list[_File] = []
    for file in _find_files(inputs):
        if file.kind == "text":
            if texts and sum(t.num_bytes for t in texts) + file.num_bytes > slice_bytes:
                slices.append(_text_slice(texts))
                texts = []
            texts.append(file)
        else:
            slices += _cut(file, slice_bytes)
    return slices + ([_text_slice(texts)] if texts else [])


def read_slice(piece: Slice, *, text_key: str) -> Iterator[str]:
    """Documents of one slice. Raises ValueError with file and line (row for parquet) for the first bad one."""
    if piece.kind == "text":
        for path in piece.paths:
            yield _read_text(path)
    elif piece.kind == ".parquet":
        yield from _read_parquet(piece, text_key)
    else:
        yield from _read_jsonl(piece, text_key)


def _find_files(inputs: Sequence[str | Path]) -> Iterator[_File]:
    for given in map(Path, inputs):
        if given.is_dir():
            visible = (p for p in sorted(given.rglob("*")) if not any(x[0] == "." for x in p.relative_to(given).parts))
            paths = [p for p in visible if p.is_file() and _kind(p)]
            if not paths:
                raise ValueError(f"{given}: no file in this folder ends in one of {', '.join(_KNOWN)}")
            yield from (_examine(path, path.relative_to(given).as_posix()) for path in paths)
        else:
            yield _examine(given, given.name)


def _kind(path: Path) -> str | None:
    for ending in _KNOWN:
        if path.name.endswith(ending):
            return "text" if ending in _TEXT else ending
    return None


def _examine(path: Path, name: str) -> _File:
    kind = _kind(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; check input=")
    if kind is None:
        raise ValueError(f"{path}: unknown kind of file; inputs end in one of {', '.join(_KNOWN)}")
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise ValueError(f"{path} is empty; delete it or leave it out")
    with open(path, "rb") as stream:
        digest = hashlib.sha256(stream.read(_HEAD_BYTES))
        stream.seek(max(0, num_bytes - _HEAD_BYTES))
        digest.update(stream.read())
    return _File(path, name, kind, num_bytes, f"{num_bytes}:{digest.hexdigest()[:16]}")


def _cut(file: _File, slice_bytes: int) -> list[Slice]:
    if file.kind == ".jsonl":
        starts = range(0, file.num_bytes, slice_bytes)
        return [_slice(file, start, min(start + slice_bytes, file.num_bytes)) for start in starts]
    if file.kind == ".parquet":
        num_groups = _open_parquet(str(file.path)).num_row_groups
        if num_groups == 0:
            raise ValueError(f"{file.path} has no rows; delete it or leave it out")
        return [_slice(file, group, group + 1, num_bytes=file.num_bytes // num_groups) for group in range(num_groups)]
    return [_slice(file, 0, file.num_bytes)]


def _slice(file: _File, start: int, stop: int, *, num_bytes: int | None = None) -> Slice:
    num_bytes = stop - start if num_bytes is None else num_bytes
    return Slice(file.kind, (str(file.path),), (file.name,), (file.identity,), start, stop, num_bytes)


def _text_slice(files: Sequence[_File]) -> Slice:
    paths, names, identity = zip(*((str(f.path), f.name, f.identity) for f in files))
    return Slice("text", paths, names, identity, 0, 0, sum(f.num_bytes for f in files))


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file (iconv -t utf-8)") from error


def _read_jsonl(piece: Slice, text_key: str) -> Iterator[str]:
    path, number = piece.paths[0], 0
    with _OPENERS[piece.kind](path, "rb") as stream:
        if piece.start:
            # The line that crosses the cut belongs to the slice before.
            stream.seek(piece.start - 1)
            stream.readline()
        while piece.kind != ".jsonl" or stream.tell() < piece.stop:
            line = _next_line(stream, path)
            if not line:
                return
            number += 1
            if line.strip():
                yield _text_of(line, text_key, piece, number)


def _next_line(stream: Any, path: str) -> bytes:
    try:
        return stream.readline()
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); download or compress it again") from error


def _text_of(line: bytes, text_key: str, piece: Slice, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{_where(piece, number)}: not valid JSON ({error}); fix or delete the line") from error
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{_where(piece, number)}: no text under {text_key!r} (found: {keys}); set text_key=")
    # JSON may hold half of a surrogate pair, which is no character and has no UTF-8: it becomes U+FFFD.
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _where(piece: Slice, number: int) -> str:
    """FILE:LINE of the number-th line of a slice. Lines before the slice are counted only here, for the error."""
    before = 0
    if piece.start:
        with open(piece.paths[0], "rb") as stream:
            stream.seek(piece.start - 1)
            stream.readline()
            start = stream.tell()
            stream.seek(0)
            while chunk := stream.read(min(1 << 20, start - stream.tell())):
                before += chunk.count(b"\n")
    return f"{piece.paths[0]}:{before + number}"


def _open_parquet(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a readable parquet file ({reason}); download it again") from error


def _read_parquet(piece: Slice, text_key: str) -> Iterator[str]:
    path = piece.paths[0]
    file = _open_parquet(path)
    if text_key not in file.schema_arrow.names:
        raise ValueError(f"{path}: no column {text_key!r} (found: {', '.join(file.schema_arrow.names)}); set text_key=")
    row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    batches = file.iter_batches(row_groups=[piece.start], columns=[text_key], batch_size=1024)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is corrupt after row {row} ({reason}); download it again") from error
        if batch is None:
            return
        for text in batch.column(0).to_pylist():
            row += 1
            if not isinstance(text, str):
                raise ValueError(f"{path}: row {row} has no text in column {text_key!r}; fix it or set text_key=")
            yield text
