"""Streamed text: whole characters only, and joined it is what decoding everything at once gives."""

from __future__ import annotations

import json

import pytest

from sbtrain.data import tokenizer as tokenizers
from sbtrain.inference.text import TextStream
from tiny_model import EOS, write_tokenizer


@pytest.fixture
def byte_level(tmp_path):
    return tokenizers.load(write_tokenizer(tmp_path))


def test_characters_of_several_tokens_come_whole(byte_level):
    text = "a é € 🙂🙂 字x"
    (ids,) = byte_level.encode_batch([text])
    assert len(ids) == len(text.encode())  # a token is a byte
    stream = TextStream(byte_level)
    pieces = [stream.push(token_id) for token_id in ids]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.finish() == ""


def test_special_tokens_are_silent_and_a_broken_end_is_shown(byte_level):
    (ids,) = byte_level.encode_batch(["ab€"])
    stream = TextStream(byte_level)
    pieces = [stream.push(token_id) for token_id in [*ids[:1], EOS, *ids[1:3]]]
    assert pieces == ["a", "", "b", ""]
    assert stream.finish() == "\ufffd"


def test_a_stray_byte_does_not_stop_the_stream(byte_level):
    letters = {letter: byte_level.encode_batch([letter])[0] for letter in "xyz€"}
    ids = [*letters["x"], letters["€"][1], *letters["y"], *letters["€"], *letters["z"]]
    stream = TextStream(byte_level)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join([*pieces, stream.finish()]) == byte_level.decode(ids) == "x\ufffdy€z"


def test_spaces_of_sentencepiece_vocabularies_survive(tmp_path):
    """Their decoders drop the space of the first token, which must not happen in the middle of a stream."""
    vocab = {"<eos>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6}
    decoder = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]}  # fmt: skip
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {"version": "1.0", "added_tokens": [{"id": 0, "content": "<eos>", "special": True, **flags}],
            "decoder": decoder,
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    tokenizer = tokenizers.load(tmp_path)
    ids = [1, 2, 3, 1, 4, 5, 6, 2]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == "the cats the€ cat"
    assert pieces[4:6] == ["", ""]
