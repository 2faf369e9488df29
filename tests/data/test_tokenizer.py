"""Round trips, bytes per token, and every way in which a tokenizer folder can be wrong."""

from __future__ import annotations

import json

import pytest
import tokenizers

from sbtrain.data import tokenizer
from tiny_corpus import EOS, VOCAB_SIZE, sha256, write_tokenizer

TEXT = "the naïve 你好 🙂\n\tother [x] <eos>"


def test_round_trip_identity_and_eos(tmp_path):
    loaded = tokenizer.load(write_tokenizer(tmp_path))
    (ids,) = loaded.encode_batch([TEXT], parse_special=False)
    assert loaded.decode(ids) == TEXT
    assert (loaded.eos_id, loaded.vocab_size) == (EOS, VOCAB_SIZE)
    assert loaded.sha256 == sha256(tmp_path / "tokenizer.json")
    assert 258 in ids and 259 in ids


def test_text_is_never_a_control_token_unless_asked(tmp_path):
    loaded = tokenizer.load(write_tokenizer(tmp_path))
    assert loaded.encode_batch(["a<eos>"])[0][-1] == EOS
    assert EOS not in loaded.encode_batch(["a<eos>"], parse_special=False)[0]


def test_token_bytes_add_up_to_the_text(tmp_path):
    loaded = tokenizer.load(write_tokenizer(tmp_path))
    sizes = loaded.token_bytes()
    (ids,) = loaded.encode_batch([TEXT], parse_special=False)
    assert sizes[ids].sum() == len(TEXT.encode())
    assert (sizes[EOS], sizes[258], sizes[259]) == (0, 3, 3)
    assert len(sizes) == VOCAB_SIZE


def test_token_bytes_of_sentencepiece_with_byte_fallback(tmp_path):
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "é": 4, **{f"<0x{byte:02X}>": 5 + byte for byte in range(256)}}
    model = tokenizers.models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    sentencepiece = tokenizers.Tokenizer(model)
    sentencepiece.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    sentencepiece.decoder = tokenizers.decoders.Sequence(steps)
    sentencepiece.add_special_tokens(["<unk>"])
    sentencepiece.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path, eos_id=0)
    (ids,) = loaded.encode_batch([" a é你"])
    assert loaded.decode(ids) == " a é你"
    assert loaded.token_bytes()[ids].tolist() == [2, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_eos_from_other_configs(tmp_path, name):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / name).write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert tokenizer.load(tmp_path).eos_id == 7


def test_bad_folders_are_one_line_errors(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing; point data\.tokenizer"):
        tokenizer.load(tmp_path / "nowhere")
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no end-of-text token"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="not a readable tokenizer") as caught:
        tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_vocabulary_must_fit_the_model(tmp_path):
    loaded = tokenizer.load(write_tokenizer(tmp_path))
    tokenizer.check_vocabulary(loaded, VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"ids up to 259, but model\.vocab_size is 259"):
        tokenizer.check_vocabulary(loaded, VOCAB_SIZE - 1)
