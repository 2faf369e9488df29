"""Documents of one source, back to back in an endless shuffled order, cut into samples; samples joined to rows.

Sample j of a source is tokens [j*L, (j+1)*L) of that stream, L = seq_len: a pure function of (seed, source, j). It is
found by prefix sums of the document lengths, without reading what comes before it. Documents that do not fit go on in
the next sample, where they count as a new document: positions and state restart, attention never reaches back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from parallel.sequence.shard import IGNORE, Row
from sbtrain.data.source import Corpus


@dataclass(frozen=True)
class Sample:
    """seq_len tokens of one source.

    tokens, labels: int64 [L], the label is the next token of the same document, IGNORE at its end.
    starts: int64 [n], where its documents begin; starts[0] is 0.
    """

    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray


class Stream:
    """A corpus repeated without end, each epoch in the order that `order(epoch)` gives (int64 [num_documents])."""

    def __init__(self, corpus: Corpus, *, order: Callable[[int], np.ndarray]):
        self.corpus = corpus
        self._order = order
        # Two epochs, because a sample may begin in one and end in the next.
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    def sample(self, index: int, *, seq_len: int) -> Sample:
        """Sample number `index` of length seq_len. Raises ValueError where the file is corrupt."""
        position, filled = index * seq_len, 0
        tokens = np.empty(seq_len, dtype=np.int64)
        labels = np.empty(seq_len, dtype=np.int64)
        starts = []
        while filled < seq_len:
            document, offset = self._locate(position + filled)
            length = int(self.corpus.lengths[document])
            size = min(length - offset, seq_len - filled)
            # One token more than the sample holds, where the document has it: the label of the last one.
            read = self.corpus.read(document, offset, min(offset + size + 1, length))
            tokens[filled : filled + size] = read[:size]
            labels[filled : filled + size] = IGNORE
            labels[filled : filled + len(read) - 1] = read[1:]
            starts.append(filled)
            filled += size
        return Sample(tokens, labels, np.array(starts))

    def documents(self, index: int, *, seq_len: int) -> list[int]:
        """Numbers, in the corpus, of the documents that sample number `index` is made of."""
        position, stop, found = index * seq_len, (index + 1) * seq_len, []
        while position < stop:
            document, offset = self._locate(position)
            found.append(document)
            position += int(self.corpus.lengths[document]) - offset
        return found

    def _locate(self, position: int) -> tuple[int, int]:
        """Document and offset inside it of a token of the endless stream."""
        epoch, rest = divmod(position, self.corpus.num_tokens)
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, rest, side="right"))
        document = int(order[place])
        return document, rest - int(ends[place]) + int(self.corpus.lengths[document])

    def _build_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = self._order(epoch)
        return order, np.cumsum(self.corpus.lengths[order], dtype=np.int64)


def shuffled(corpus: Corpus, *, seed: str) -> Callable[[int], np.ndarray]:
    """A fresh order of a corpus's documents for every epoch, drawn from (seed, corpus.name, epoch)."""

    def order(epoch: int) -> np.ndarray:
        digest = hashlib.sha256(f"{seed}/{corpus.name}/{epoch}".encode()).digest()
        # Raw bits: numpy promises the same on every platform and in every version, which it does not for shuffles.
        bits = np.random.PCG64(int.from_bytes(digest[:16], "big")).random_raw(corpus.num_documents)
        return np.argsort(bits, kind="stable")

    return order


def in_order(corpus: Corpus) -> Callable[[int], np.ndarray]:
    """The order of the file, in every epoch."""
    return lambda epoch: np.arange(corpus.num_documents)


def make_row(samples: Sequence[Sample]) -> Row:
    """Join samples of equal length to one Row; every sample begins a new document."""
    seq_len = len(samples[0].tokens)
    bounds = [sample.starts + n * seq_len for n, sample in enumerate(samples)]
    cu_seqlens = np.concatenate([*bounds, [len(samples) * seq_len]]).astype(np.int32)
    return Row(
        tokens=torch.from_numpy(np.concatenate([sample.tokens for sample in samples])),
        labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
        cu_seqlens=torch.from_numpy(cu_seqlens),
    )
