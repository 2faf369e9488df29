"""The one door to `tokenizers`: text to ids and back, the end-of-document id, and how many bytes each id stands for.

A tokenizer is a Hugging Face folder with a tokenizer.json (and, for the end-of-document token, a
tokenizer_config.json, generation_config.json or config.json beside it).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A loaded tokenizer.json.

    folder: where it came from. eos_id: ends every document. vocab_size: largest id + 1, added tokens included.
    sha256: of tokenizer.json, the identity that prepared corpora record.
    """

    def __init__(self, folder: Path, raw: bytes, eos_id: int | None):
        self.folder = folder
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self._raw = raw
        self._fast = _parse(folder, raw)
        self._ids = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        self.eos_id = self._eos(eos_id)

    def _eos(self, eos_id: int | None) -> int:
        if eos_id is None:
            eos_id = _configured_eos(self.folder, self._ids)
        if eos_id is None:
            raise ValueError(
                f"{self.folder}: no end-of-text token; name it as eos_token in {self.folder / 'tokenizer_config.json'}"
            )
        if not 0 <= eos_id < self.vocab_size:
            raise ValueError(f"{self.folder}: eos id {eos_id} is outside the vocabulary of {self.vocab_size}")
        return eos_id

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """Ids of each text, nothing added. parse_special=False reads "<|endoftext|>" in a text as plain characters."""
        self._fast.encode_special_tokens = not parse_special
        return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids. Ids that the tokenizer lacks (padding of the model's vocabulary) come out empty."""
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int64 [vocab_size]; special tokens and unused ids count 0.

        Exact for byte-level BPE. For sentencepiece-style vocabularies a leading "▁" counts as the space it stands
        for, also at the start of a text, where the tokenizer adds it.
        """
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        spec = json.loads(self._raw)
        byte_level = any('"ByteLevel"' in json.dumps(spec.get(part)) for part in ("decoder", "pre_tokenizer"))
        count = _byte_level_bytes if byte_level else _sentencepiece_bytes
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self._ids.items():
            sizes[token_id] = count(token)
        for token in spec.get("added_tokens", ()):
            sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
        return sizes


def load(folder: str | Path, *, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. eos_id overrides the one that the folder names.

    Raises ValueError, one line naming the file and the fix, if there is none or it does not parse.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; point data.tokenizer at a folder that holds a tokenizer.json")
    return Tokenizer(Path(folder), path.read_bytes(), eos_id)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError if the tokenizer can emit an id that a model of `vocab_size` rows does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{tokenizer.folder / 'tokenizer.json'} has ids up to {tokenizer.vocab_size - 1}, but model.vocab_size is "
            f"{vocab_size}; use the tokenizer that belongs to the model"
        )


def _parse(folder: Path, raw: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises plain Exception
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{folder / 'tokenizer.json'} is not a readable tokenizer ({reason}); fetch it again"
        ) from error


def _configured_eos(folder: Path, ids: dict[str, int]) -> int | None:
    """The eos of tokenizer_config.json, else of generation_config.json, else of config.json, else None."""
    eos = _read_json(folder / "tokenizer_config.json").get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos is not None:
        return ids.get(eos)
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(folder / name).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if isinstance(eos, int):
            return eos
    return None


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return content


def _byte_level_bytes(token: str) -> int:
    """Byte-level BPE writes every byte as one character of its own, so characters are bytes."""
    return len(token)


def _sentencepiece_bytes(token: str) -> int:
    if _BYTE_FALLBACK.fullmatch(token):
        return 1
    return len(token.replace("▁", " ").encode())
