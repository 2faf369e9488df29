"""Rows of a held-out corpus, in file order, and how many bytes of text their scored tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from parallel.sequence.shard import IGNORE, Row
from sbtrain.data.pack import Sample, Stream, in_order, make_row
from sbtrain.data.source import Corpus, open_corpus
from sbtrain.data.tokenizer import Tokenizer


def heldout_rows(
    prefix: str, *, seq_len: int, tokens: int, tokenizer: Tokenizer | None = None, fill: bool = True
) -> list[Row]:
    """Rows of one sequence each, `tokens` // seq_len of them and at least one, always the same for a corpus.

    Where the corpus is shorter it is read once, and the last row is filled up with eos that is not scored, or with
    fill=False left short. With a tokenizer its identity is checked, and tokens without text (the eos after a document)
    are not scored, so that the loss is about the same bytes whatever the tokenizer. Raises ValueError as `open_corpus`
    does.
    """
    sha256 = tokenizer.sha256 if tokenizer else None
    corpus = open_corpus(prefix, tokenizer_sha256=sha256)
    stream = Stream(corpus, order=in_order(corpus))
    num_rows = min(max(1, tokens // seq_len), -(-corpus.num_tokens // seq_len))
    samples = [stream.sample(index, seq_len=seq_len) for index in range(num_rows)]
    corpus.close()
    num_real = corpus.num_tokens - (num_rows - 1) * seq_len
    samples[-1] = _end_with_corpus(samples[-1], corpus, num_real=num_real, fill=fill)
    rows = [make_row([sample]) for sample in samples]
    if tokenizer is None:
        return rows
    sizes = torch.from_numpy(tokenizer.token_bytes())
    return [Row(row.tokens, _only_text(row.labels, sizes), row.cu_seqlens) for row in rows]


def scored_bytes(rows: Sequence[Row], token_bytes: np.ndarray) -> int:
    """UTF-8 bytes of the tokens that the rows' labels score: bits per byte = summed nats / ln 2 / these bytes."""
    sizes = torch.from_numpy(token_bytes)
    return sum(int(sizes[row.labels[row.labels != IGNORE]].sum()) for row in rows)


def _end_with_corpus(sample: Sample, corpus: Corpus, *, num_real: int, fill: bool) -> Sample:
    """Replace what the endless stream repeats, from token num_real on, by one unscored document of eos, or cut it."""
    if num_real >= len(sample.tokens):
        return sample
    starts = sample.starts[sample.starts < num_real]
    if not fill:
        return Sample(sample.tokens[:num_real], sample.labels[:num_real], starts)
    padding = np.arange(len(sample.tokens)) >= num_real
    return Sample(
        tokens=np.where(padding, corpus.eos_id, sample.tokens),
        labels=np.where(padding, IGNORE, sample.labels),
        starts=np.append(starts, num_real),
    )


def _only_text(labels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    scored = labels != IGNORE
    has_text = sizes[labels.clamp_min(0)] > 0
    return torch.where(scored & has_text, labels, torch.full_like(labels, IGNORE))
