"""Every kind of input gives the right tokens; killed and continued gives the same files; bad input is one line."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sbtrain.data import inputs
from sbtrain.data import prepare as module
from sbtrain.data.prepare import prepare
from sbtrain.data.source import open_corpus
from tiny_corpus import EOS, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["the first", "zweiter é", "", "third <eos> other", "四"]


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


def expected_documents(texts):
    """Tokens by hand: bytes + 1, with "the" and "th" merged."""
    documents = []
    for text in filter(None, texts):
        ids = "".join(chr(1 + byte) for byte in text.encode())
        the, th = "".join(chr(1 + ord(c)) for c in "the"), "".join(chr(1 + ord(c)) for c in "th")
        documents.append([ord(c) for c in ids.replace(the, chr(258)).replace(th, chr(257))] + [EOS])
    return documents


def read_corpus(prefix):
    """Documents, read without megatron."""
    raw = Path(f"{prefix}.idx").read_bytes()
    count = int.from_bytes(raw[18:26], "little")
    lengths = np.frombuffer(raw, np.int32, count, 34)
    tokens = np.frombuffer(Path(f"{prefix}.bin").read_bytes(), np.uint16)
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths))[:-1]]


def write_jsonl(path, texts, *, key="text"):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts)
    return path


def random_texts(count):
    rng = random.Random(1)
    return ["".join(rng.choice("the é\n") for _ in range(rng.randrange(1, 80))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.xz", "parquet", "txt"])
def test_every_kind_of_input(tmp_path, folder, kind):
    source = tmp_path / "in"
    source.mkdir()
    if kind == "parquet":
        table = pyarrow.table({"text": TEXTS, "n": range(len(TEXTS))})
        pyarrow.parquet.write_table(table, source / "a.parquet", row_group_size=2)
    elif kind == "txt":
        for n, text in enumerate(filter(None, TEXTS)):
            (source / f"{n}.txt").write_text(text)
        (source / "ignored.bin").write_text("x")
    else:
        write_jsonl(source / f"a.{kind}", TEXTS)
    (made,) = prepare([source], tmp_path / "out" / "c", tokenizer=folder, progress=False)
    documents = expected_documents(TEXTS)
    assert read_corpus(tmp_path / "out" / "c") == documents
    about = json.loads(made.read_text())
    assert about["num_documents"] == 4
    assert about["num_tokens"] == sum(map(len, documents))
    assert about["num_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert (about["eos_id"], about["vocab_size"]) == (EOS, 260)
    assert str(tmp_path) not in made.read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["c.bin", "c.crc", "c.idx", "c.json"]


def test_checksums_are_of_what_was_written_and_are_added_to_older_corpora(tmp_path, folder):
    source, prefix = write_jsonl(tmp_path / "a.jsonl", TEXTS * 9000), tmp_path / "c"
    (made,) = prepare([source], prefix, tokenizer=folder, progress=False, slice_bytes=2**17)
    corpus, raw = open_corpus(str(prefix)), (tmp_path / "c.bin").read_bytes()
    assert corpus.is_sealed and len(raw) > 2 * 65536
    assert corpus.read(corpus.num_documents - 1, 0, 2).tolist() == expected_documents(TEXTS)[-1][:2]
    sums, about = (tmp_path / "c.crc").read_bytes(), made.read_text()
    assert sums == b"".join(zlib.crc32(raw[n : n + 65536]).to_bytes(4, "little") for n in range(0, len(raw), 65536))
    (tmp_path / "c.crc").unlink()
    made.write_text(json.dumps({key: value for key, value in json.loads(about).items() if key != "checksums"}))
    assert not open_corpus(str(prefix)).is_sealed
    for _ in range(2):
        prepare([source], prefix, tokenizer=folder, progress=False, slice_bytes=2**17)
        assert (tmp_path / "c.crc").read_bytes() == sums and json.loads(made.read_text()) == json.loads(about)


def test_megatron_reads_it(tmp_path, folder):
    from parallel.mcore import IndexedDataset

    prepare([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "c", tokenizer=folder, progress=False)
    dataset = IndexedDataset(str(tmp_path / "c"))
    assert [dataset[n].tolist() for n in range(len(dataset))] == expected_documents(TEXTS)
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_slices_cover_every_line_once(tmp_path):
    texts = random_texts(60) + ["x" * 5000] + random_texts(3)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    for slice_bytes in (1, 17, 333, 10**6):
        slices = inputs.find_slices([path], slice_bytes=slice_bytes)
        assert [text for piece in slices for text in inputs.read_slice(piece, text_key="text")] == texts


def test_result_does_not_depend_on_workers(tmp_path, folder):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(200))
    prefixes = [tmp_path / "one", tmp_path / "two"]
    for prefix, num_workers in zip(prefixes, (1, 2)):
        prepare([path], prefix, tokenizer=folder, num_workers=num_workers, slice_bytes=4000, progress=False)
    for ending in (".bin", ".idx", ".json"):
        one, two = (Path(f"{prefix}{ending}").read_bytes() for prefix in prefixes)
        assert one == two


def test_held_out_split_is_by_document(tmp_path, folder):
    texts = random_texts(400)
    path = write_jsonl(tmp_path / "a.jsonl", texts + texts)
    made = prepare([path], tmp_path / "c", tokenizer=folder, valid_percent=10.0, progress=False)
    assert [p.name for p in made] == ["c_train.json", "c_valid.json"]
    train, valid = (read_corpus(tmp_path / f"c_{split}") for split in ("train", "valid"))
    assert len(train) + len(valid) == 800
    assert 40 <= len(valid) <= 120
    assert not {tuple(d) for d in train} & {tuple(d) for d in valid}


def test_killed_at_any_moment_continues(tmp_path, folder):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(4000))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare([path], whole, tokenizer=folder, slice_bytes=2000, progress=False)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from sbtrain.data.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(sys.argv[2:3], sys.argv[3], tokenizer=sys.argv[4], slice_bytes=2000, progress=False)\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(path), str(killed), str(folder)]
    process = subprocess.Popen(command)
    parts = tmp_path / "killed.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not Path(f"{killed}.json").exists() and not Path(f"{killed}.bin").exists()
    assert len(list(parts.glob("*.json"))) >= 3
    prepare([path], killed, tokenizer=folder, slice_bytes=2000, progress=False)
    for ending in (".bin", ".idx", ".json"):
        assert Path(f"{killed}{ending}").read_bytes() == Path(f"{whole}{ending}").read_bytes()
    assert not parts.exists()


def test_finished_parts_are_not_made_again(tmp_path, folder, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(100))
    tokenize, made = module._tokenize, []

    def interrupted(task, settings):
        if len(made) == 2:
            raise KeyboardInterrupt
        counted(task, settings)

    def counted(task, settings):
        made.append(task.part.name)
        tokenize(task, settings)

    monkeypatch.setattr(module, "_tokenize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([path], tmp_path / "c", tokenizer=folder, slice_bytes=1000, progress=False)
    first = set(made)
    monkeypatch.setattr(module, "_tokenize", counted)
    prepare([path], tmp_path / "c", tokenizer=folder, slice_bytes=1000, progress=False)
    assert len(first) == 2 and len(made) == len(set(made)) > 2
    prepare([path], tmp_path / "c", tokenizer=folder, slice_bytes=1000, progress=False)
    assert len(made) == len(set(made))


def test_other_input_under_the_same_prefix_is_refused(tmp_path, folder):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare([path], tmp_path / "c", tokenizer=folder, progress=False)
    before = (tmp_path / "c.bin").read_bytes()
    write_jsonl(path, [*TEXTS, "more"])
    with pytest.raises(ValueError, match=r"c\.json is a corpus of other inputs"):
        prepare([path], tmp_path / "c", tokenizer=folder, progress=False)
    (tmp_path / "c.json").unlink()
    with pytest.raises(ValueError, match=r"c\.bin exists and is not from an interrupted run"):
        prepare([path], tmp_path / "c", tokenizer=folder, progress=False)
    assert (tmp_path / "c.bin").read_bytes() == before


def _bad_line(path):
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')


def _bad_line_in_late_slice(path):
    path.write_text('{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}\n' * 99 + "oops\n")


def _no_key(path):
    path.write_text('{"text": "a"}\n{"body": "b"}\n')


def _not_text(path):
    path.write_text('{"text": 3}\n')


def _truncated_gz(path):
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])


def _not_utf8(path):
    path.write_bytes(b"abc\xff")


BAD = [
    ("a.jsonl", _bad_line, r"a\.jsonl:3: not valid JSON"),
    ("a.jsonl", _bad_line_in_late_slice, r"a\.jsonl:100: not valid JSON"),
    ("a.jsonl", _no_key, r"a\.jsonl:2: no text under 'text' \(found: body\); set text_key="),
    ("a.jsonl", _not_text, r"a\.jsonl:1: no text under 'text'"),
    ("a.jsonl", lambda path: path.touch(), r"a\.jsonl is empty"),
    ("a.jsonl", lambda path: path.write_text("\n\n"), r"no document is left"),
    ("a.jsonl.gz", _truncated_gz, r"a\.jsonl\.gz is truncated or corrupt"),
    ("a.parquet", lambda path: path.write_text("PAR1 not"), r"a\.parquet is not a readable parquet file"),
    ("a.txt", _not_utf8, r"a\.txt: byte 3 is not UTF-8"),
    ("a.doc", lambda path: path.write_text("x"), r"a\.doc: unknown kind of file"),
    ("a.jsonl", lambda path: None, r"a\.jsonl does not exist"),
    ("a", lambda path: path.mkdir(), r"no file in this folder"),
]


@pytest.mark.parametrize(("name", "write", "message"), BAD)
def test_bad_input_is_one_line_and_leaves_no_corpus(tmp_path, folder, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        prepare([path], tmp_path / "c", tokenizer=folder, slice_bytes=500, progress=False)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("c.[bij]*"))


def test_parquet_errors_name_column_and_row(tmp_path, folder):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", None]}), path, row_group_size=2)
    with pytest.raises(ValueError, match=r"a\.parquet: row 3 has no text"):
        prepare([path], tmp_path / "c", tokenizer=folder, progress=False)
    with pytest.raises(ValueError, match=r"no column 'body' \(found: text\); set text_key="):
        prepare([path], tmp_path / "c", tokenizer=folder, text_key="body", progress=False)


def test_no_space_left_is_one_line_and_keeps_the_parts(tmp_path, folder, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(50))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_sums", full)
    with pytest.raises(ValueError, match="no space left for .*c; free some and repeat"):
        prepare([path], tmp_path / "c", tokenizer=folder, slice_bytes=1000, progress=False)
    assert list((tmp_path / "c.parts").glob("*.json"))
    monkeypatch.undo()
    prepare([path], tmp_path / "c", tokenizer=folder, slice_bytes=1000, progress=False)
    assert read_corpus(tmp_path / "c") == expected_documents(random_texts(50))


def test_command_line(tmp_path, folder):
    path = write_jsonl(tmp_path / "odd=name, 1.jsonl", TEXTS, key="body")
    command = [sys.executable, str(ROOT / "launch" / "prepare_data.py")]
    arguments = [f"input={path}", f"out={tmp_path / 'c'}", f"tokenizer={folder}", "workers=2"]
    failed = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert failed.returncode == 2
    assert f"error: {path}:1: no text under 'text' (found: body); set text_key=" in failed.stderr
    assert "Traceback" not in failed.stderr
    done = subprocess.run([*command, *arguments, "text_key=body"], capture_output=True, text=True, check=True)
    assert f"ready: {tmp_path / 'c.json'}" in done.stdout
    assert read_corpus(tmp_path / "c") == expected_documents(TEXTS)
    wrong = subprocess.run([*command, "inputs=x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "'inputs=x' is not one of input=" in wrong.stderr
