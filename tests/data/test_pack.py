"""Samples against a plain concatenation of the documents: tokens, labels, boundaries, wraparound, frozen order."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.sequence.shard import IGNORE
from sbtrain.data.pack import Stream, in_order, make_row, shuffled
from sbtrain.data.source import open_corpus
from tiny_corpus import EOS, counted_documents, write_corpus

LENGTHS = [7, 1, 30, 2, 12, 5, 0, 3]


@pytest.fixture
def corpus(tmp_path):
    documents = [[] if n == 0 else d for n, d in zip(LENGTHS, counted_documents([max(n, 1) for n in LENGTHS]))]
    return open_corpus(write_corpus(tmp_path / "c", documents), name="c")


def plain_stream(corpus, order, num_epochs):
    """(tokens, labels, document number in the stream) of whole epochs, the slow way."""
    tokens, labels, numbers = [], [], []
    count = 0
    for epoch in range(num_epochs):
        for document in order(epoch):
            ids = corpus.read(document, 0, corpus.lengths[document]).tolist()
            tokens += ids
            labels += [*ids[1:], IGNORE] if ids else []
            numbers += [count] * len(ids)
            count += 1
    return np.array(tokens), np.array(labels), np.array(numbers)


@pytest.mark.parametrize("seq_len", [1, 4, 16, 60, 100])
def test_samples_tile_the_shuffled_epochs(corpus, seq_len):
    order = shuffled(corpus, seed="s")
    tokens, labels, numbers = plain_stream(corpus, order, num_epochs=5)
    stream = Stream(corpus, order=order)
    for index in reversed(range(len(tokens) // seq_len)):  # backwards: no sample needs the one before
        part = slice(index * seq_len, (index + 1) * seq_len)
        sample = stream.sample(index, seq_len=seq_len)
        assert sample.tokens.tolist() == tokens[part].tolist()
        assert sample.labels.tolist() == labels[part].tolist()
        assert sample.starts.tolist() == [0, *(np.flatnonzero(np.diff(numbers[part])) + 1)]


def test_every_epoch_has_every_document_once_in_its_own_order(corpus):
    order = shuffled(corpus, seed="s")
    orders = [order(epoch).tolist() for epoch in range(4)]
    assert all(sorted(o) == list(range(len(LENGTHS))) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert shuffled(corpus, seed="t")(0).tolist() != orders[0]


def test_far_places_cost_nothing(corpus):
    stream = Stream(corpus, order=shuffled(corpus, seed="s"))
    assert stream.sample(10**12, seq_len=8).tokens.shape == (8,)


def test_row_isolates_documents_and_samples(corpus):
    stream = Stream(corpus, order=shuffled(corpus, seed="s"))
    row = make_row([stream.sample(n, seq_len=16) for n in (3, 0)])
    assert row.tokens.dtype == row.labels.dtype and str(row.tokens.dtype) == "torch.int64"
    assert str(row.cu_seqlens.dtype) == "torch.int32"
    bounds = row.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == 32 and 16 in bounds and bounds == sorted(bounds)
    for start, stop in zip(bounds, bounds[1:]):
        inside = row.tokens[start:stop]
        assert EOS not in inside[:-1]
        assert row.labels[start : stop - 1].tolist() == inside[1:].tolist()
        assert inside[-1] != EOS or row.labels[stop - 1] == IGNORE


def test_label_of_the_last_token_looks_past_the_cut(corpus):
    stream = Stream(corpus, order=in_order(corpus))
    first, second = (stream.sample(n, seq_len=16) for n in (0, 1))
    assert first.tokens[-1] != EOS
    assert first.labels[-1] == second.tokens[0]


def test_order_is_frozen(corpus):
    """If this changes, runs that continue from older checkpoints read other samples: do not update it lightly."""
    sample = Stream(corpus, order=shuffled(corpus, seed="1234/ctx_8k")).sample(5, seq_len=16)
    assert sample.tokens.tolist() == [36, 0, 0, 1, 2, 3, 4, 5, 6, 0, 7, 8, 9, 10, 11, 12]
    assert shuffled(corpus, seed="1234/ctx_8k")(7).tolist() == [7, 0, 6, 4, 5, 3, 1, 2]
