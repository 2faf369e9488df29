"""Token ids to text while they arrive: a character of several tokens appears when its last byte is there."""

from __future__ import annotations

from sbtrain.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"
"""What decoders show for bytes that are no character (yet)."""


class TextStream:
    """Text of a growing sequence of ids; special tokens are left out. The pieces joined are the text of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Ids of the last piece, whose text is out, and those since: decoders treat the first token of a text specially.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this id completes, "" in the middle of a character."""
        self._pending.append(token_id)
        piece = self._new_text()
        return "" if piece.endswith(_INCOMPLETE) else self._emit(piece)

    def finish(self) -> str:
        """What is left at the end: an incomplete character as the decoder shows it, or ""."""
        return self._emit(self._new_text()) if self._pending else ""

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special=True)
        return self._tokenizer.decode(self._context + self._pending, skip_special=True)[len(before) :]

    def _emit(self, piece: str) -> str:
        if piece:
            self._context = self._pending
        else:
            self._context = self._context + self._pending
        self._pending = []
        return piece
