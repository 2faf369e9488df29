"""Text that the user names by a file or by the prefix of prepare_data's files, as a tokenized corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sbtrain.data.inputs import find_slices, read_slice
from sbtrain.data.prepare import prepare
from sbtrain.data.tokenizer import Tokenizer

_BATCH_DOCUMENTS = 16


def check_data(data: str) -> None:
    """Raise ValueError where data= is neither."""
    if not is_text(data) and not Path(f"{data}.json").is_file():
        raise ValueError(f"data={data} is neither a text file nor a prefix of prepare_data's files; check the path")


def is_text(data: str) -> bool:
    """Whether it is a text file, of a kind that prepare_data reads."""
    return Path(data).is_file() and not Path(f"{data}.idx").is_file()


def excerpt(data: str, prefix: Path, tokenizer: Tokenizer, *, tokens: int, text_key: str) -> str:
    """Write the first documents of a text file under a prefix, with so many tokens if the file has them; the prefix."""
    wanted, lines_of = tokens, prefix.with_suffix(".jsonl")
    with open(lines_of, "w", encoding="utf-8") as lines:
        for documents in _batches(data, text_key):
            lines.writelines(json.dumps({"text": text}) + "\n" for text in documents)
            wanted -= sum(map(len, tokenizer.encode_batch(documents, parse_special=False)))
            if wanted <= 0:
                break
    prepare([lines_of], prefix, tokenizer=tokenizer.folder, progress=False)
    return str(prefix)


def _batches(data: str, text_key: str) -> Iterator[list[str]]:
    batch = []
    for piece in find_slices([data], slice_bytes=2**25):
        for text in read_slice(piece, text_key=text_key):
            batch.append(text)
            if len(batch) == _BATCH_DOCUMENTS:
                yield batch
                batch = []
    if batch:
        yield batch
