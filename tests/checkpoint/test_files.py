"""Small files: a crash at any moment of a write leaves the old content or the new one, never a torn file."""

from __future__ import annotations

import json
import os

import pytest

from sbtrain.checkpoint import files
from sbtrain.checkpoint.files import read_json, write_json
from sbtrain.checkpoint.ledger import Ledger

OLD = {"stages_done": ["ctx_8k"], "checkpoint": "checkpoints/step_7", "step": 7}


class Crash(BaseException):
    """Stands for the process being killed: nothing in the code under test may catch it."""


def crash(*args, **kwargs):
    raise Crash


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.json"
    for value in (OLD, {"ä": [1, None, "é"]}, []):
        write_json(path, value)
        assert read_json(path) == value == json.loads(path.read_text("utf-8"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("moment", ["dump", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_content(tmp_path, monkeypatch, moment):
    path = tmp_path / "ledger.json"
    write_json(path, OLD)
    before = path.read_bytes()
    module = {"dump": files.json, "fsync": os, "replace": os}[moment]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(module, moment, crash)
        write_json(path, {"step": 8})
    assert path.read_bytes() == before and read_json(path) == OLD
    write_json(path, {"step": 8})  # what the crash left behind is in nobody's way
    assert read_json(path) == {"step": 8} and [file.name for file in tmp_path.iterdir()] == ["ledger.json"]


def test_a_value_that_json_lacks_leaves_the_old_content(tmp_path):
    path = tmp_path / "ledger.json"
    write_json(path, OLD)
    with pytest.raises(TypeError):
        write_json(path, {"step": 8, "checkpoint": object()})
    assert read_json(path) == OLD


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write_json(tmp_path / "a.json", OLD)
    assert calls == ["fsync", "replace", "fsync"], "the file, its name, and the folder that holds the name"


@pytest.mark.parametrize("content", [b"", b'{"step": 1', b"\xff\xfe{}", b"step: 1"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "ledger.json"
    path.write_bytes(content)
    for read in (read_json, lambda path: Ledger(path.parent)):
        with pytest.raises(ValueError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{path} is not valid JSON") and "another run_dir" in str(caught.value)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*ledger\.json'"):
        write_json(tmp_path / "ledger.json", OLD)
