"""A byte-level tokenizer with a few merges, and corpora of a few documents, made without the code under test."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

EOS = 0
VOCAB_SIZE = 260


def byte_characters() -> list[str]:
    """GPT-2's character for each byte: printable Latin-1 is itself, the others are shifted past 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


def write_tokenizer(folder: Path) -> Path:
    """ids: 0 the eos, 1 + byte, then "th", "the", and the added (not special) token "[x]"."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {character: 1 + byte for byte, character in enumerate(byte_characters())} | {"th": 257, "the": 258}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<eos>", "special": True, **flags},
            {"id": 259, "content": "[x]", "special": False, **flags},
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {"<eos>": 0, **vocab}, "merges": [["t", "h"], ["th", "e"]]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def write_corpus(
    prefix: Path, documents: Sequence[Sequence[int]], *, tokenizer_sha256: str = "none", sealed: bool = False
) -> str:
    """Write PREFIX.bin/.idx/.json byte by byte as megatron's format defines them. Returns the prefix.

    sealed: with checksums, in PREFIX.crc.
    """
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    tokens = np.concatenate([np.array(document, dtype=np.uint16) for document in documents])
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) * 2
    header = b"MMIDIDX\x00\x00" + np.uint64(1).tobytes() + np.uint8(8).tobytes()
    counts = np.array([len(documents), len(documents) + 1], dtype=np.uint64)
    bounds = np.arange(len(documents) + 1, dtype=np.int64)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    Path(f"{prefix}.idx").write_bytes(b"".join([header, *(a.tobytes() for a in (counts, lengths, pointers, bounds))]))
    about = {
        "num_tokens": len(tokens),
        "num_bytes": len(tokens) - len(documents),
        "vocab_size": VOCAB_SIZE,
        "eos_id": EOS,
        "tokenizer_sha256": tokenizer_sha256,
    }
    if sealed:
        raw = tokens.tobytes()
        sums = b"".join(np.uint32(zlib.crc32(raw[n : n + 65536])).tobytes() for n in range(0, len(raw), 65536))
        Path(f"{prefix}.crc").write_bytes(sums)
        index = Path(f"{prefix}.idx").read_bytes()
        about["checksums"] = {"block_bytes": 65536, "crc": f"{zlib.crc32(sums):08x}", "idx": f"{zlib.crc32(index):08x}"}
    Path(f"{prefix}.json").write_text(json.dumps(about))
    return str(prefix)


def counted_documents(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of the given lengths without repeated tokens: 1, 2, 3, ... and eos at each end."""
    documents, following = [], 1
    for length in lengths:
        documents.append([*range(following, following + length - 1), EOS])
        following += length - 1
    return documents


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
