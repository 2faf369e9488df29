"""Held-out rows read the corpus once and in order; the bytes of the scored tokens are the bytes of the text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from parallel.sequence.shard import IGNORE
from sbtrain.data import tokenizer as tokenizers
from sbtrain.data.heldout import heldout_rows, scored_bytes
from sbtrain.data.prepare import prepare
from tiny_corpus import EOS, counted_documents, write_corpus, write_tokenizer

TEXTS = ["the naïve text", "other 你好", "third"]


@pytest.fixture
def tokenizer(tmp_path):
    return tokenizers.load(write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def prefix(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([path], tmp_path / "c", tokenizer=tokenizer.folder, progress=False)
    return str(tmp_path / "c")


def test_one_long_row_scores_all_text_but_first_tokens(prefix, tokenizer):
    (row,) = heldout_rows(prefix, seq_len=64, tokens=10**6, tokenizer=tokenizer)
    sizes = tokenizer.token_bytes()
    first = sum(len(tokenizer.decode(ids[:1]).encode()) for ids in tokenizer.encode_batch(TEXTS))
    assert scored_bytes([row], sizes) == sum(len(text.encode()) for text in TEXTS) - first
    assert EOS not in row.labels
    documents = [row.tokens[a:b] for a, b in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:])]
    assert [tokenizer.decode(d, skip_special=True) for d in documents] == [*TEXTS, ""]
    assert (documents[-1] == EOS).all()


def test_without_tokenizer_the_eos_is_scored(prefix):
    (row,) = heldout_rows(prefix, seq_len=64, tokens=64)
    assert (row.labels == EOS).sum() == len(TEXTS)


def test_rows_are_the_corpus_once_and_in_order(tmp_path):
    documents = counted_documents([5, 12, 3, 9])
    prefix = write_corpus(tmp_path / "c", documents)
    rows = heldout_rows(prefix, seq_len=8, tokens=10**6)
    flat = np.concatenate(documents)
    read = torch.cat([row.tokens for row in rows]).numpy()
    assert len(rows) == 4 and (read[: len(flat)] == flat).all() and (read[len(flat) :] == EOS).all()
    assert (torch.cat([row.labels for row in rows])[len(flat) :] == IGNORE).all()
    assert [row.tokens.tolist() for row in heldout_rows(prefix, seq_len=8, tokens=17)] == [
        row.tokens.tolist() for row in rows[:2]
    ]
    assert len(heldout_rows(prefix, seq_len=8, tokens=3)) == 1


def test_the_last_row_may_stay_short(tmp_path):
    documents = counted_documents([5, 12, 3, 9])
    prefix = write_corpus(tmp_path / "c", documents)
    filled, short = (heldout_rows(prefix, seq_len=8, tokens=10**6, fill=fill) for fill in (True, False))
    assert torch.equal(torch.cat([row.tokens for row in short]), torch.from_numpy(np.concatenate(documents)))
    assert [len(row.tokens) for row in short[:-1]] == [8] * (len(short) - 1) and len(short) == len(filled)
    last, size = short[-1], len(short[-1].tokens)
    assert torch.equal(last.labels, filled[-1].labels[:size]) and last.cu_seqlens[-1] == size
    assert last.cu_seqlens.tolist() == filled[-1].cu_seqlens[: len(last.cu_seqlens)].tolist()


def test_other_tokenizer_is_refused(tmp_path, tokenizer):
    prefix = write_corpus(tmp_path / "c", counted_documents([5]))
    with pytest.raises(ValueError, match="another tokenizer"):
        heldout_rows(prefix, seq_len=8, tokens=8, tokenizer=tokenizer)
