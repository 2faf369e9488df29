"""The manifest: any change of any file is found, and what it names lies in the folder."""

from __future__ import annotations

import errno
import json
import os
import platform
import zlib

import pytest

from sbtrain.checkpoint import manifest
from sbtrain.checkpoint.manifest import FILES, MANIFEST, Unreadable, fault, measure, put_away, seal, share
from sealed import TENSORS, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path, 3)


def test_an_untouched_checkpoint_has_no_fault(folder):
    assert fault(folder) is None and fault(folder, deep=False) is None
    (folder / "notes.txt").write_text("what nobody loads is nobody's concern")
    assert fault(folder) is None


@pytest.mark.parametrize("name", [*FILES, TENSORS])
def test_every_byte_of_every_file_counts(folder, name):
    path, content = folder / name, (folder / name).read_bytes()
    for place in {0, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert fault(folder) == f"{name} has not the checksum that manifest.json says"
    path.write_bytes(content[:-1])
    for deep in (True, False):
        says = f"{name} has {len(content) - 1} bytes, not the {len(content)} that manifest.json says"
        assert fault(folder, deep=deep) == says
    path.unlink()
    assert fault(folder) == f"{name} is missing"


def test_a_folder_without_a_manifest_is_no_checkpoint(folder):
    (folder / MANIFEST).unlink()
    says = "it has no manifest.json: it was copied in part, or a version before manifests wrote it"
    assert fault(folder) == fault(folder, deep=False) == says
    assert fault(folder / "none") == "it is gone"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"files": {}}', '{"checksum": 1, "files": []}', "[" * 100_000])
def test_a_manifest_that_is_none(folder, text):
    (folder / MANIFEST).write_text(text)
    assert fault(folder) == "manifest.json is damaged"


ENTRIES = [{}, [], None, {"bytes": -1, "crc32": "00000000"}, {"bytes": True, "crc32": "00000000"}, {"bytes": 1},
           {"bytes": 1.5, "crc32": "00000000"}, {"bytes": 1, "crc32": "0"}, {"bytes": 1, "crc32": None},
           {"bytes": 1, "crc32": "00000000", "url": "x"}]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_that_is_none(folder, entry):
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][TENSORS] = entry
    (folder / MANIFEST).write_text(json.dumps(content))
    assert fault(folder) == f"manifest.json is damaged at {TENSORS}"


def test_checksums_of_another_kind_are_not_taken_for_ours(folder):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "checksum": "md5"}))
    assert fault(folder) == "manifest.json has checksums of another kind ('md5')"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", "a\nb", MANIFEST])
def test_a_manifest_cannot_lead_out_of_its_folder(folder, name):
    (folder.parent / "secret").write_bytes(b"x")
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = measure(folder.parent, ["secret"])["secret"]
    (folder / MANIFEST).write_text(json.dumps(content))
    assert fault(folder) == f"manifest.json names {name!r}, which is no file of a checkpoint"


def test_links_pipes_and_folders_are_not_followed(folder, tmp_path):
    """A pipe would wait for ever, a link may lead anywhere."""
    content = (folder / TENSORS).read_bytes()
    (tmp_path / "same").write_bytes(content)

    def link(path):
        path.symlink_to(tmp_path / "same")

    for make in (link, os.mkfifo, os.mkdir):
        path = folder / TENSORS
        path.unlink() if path.exists() else None
        make(path)
        assert fault(folder) == f"{TENSORS} is no regular file"
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
@pytest.mark.parametrize("call", ["pread", "open", "lstat", "stat"])
def test_what_this_host_cannot_read_is_no_fault_of_the_checkpoint(folder, monkeypatch, call, number):
    before = getattr(os, call)

    def fail(place, *args, **kwargs):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{place}")) if call == "pread" else os.path.basename(place)
        if name in (TENSORS, folder.name):
            raise OSError(number, os.strerror(number), *([] if call == "pread" else [str(place)]))
        return before(place, *args, **kwargs)

    monkeypatch.setattr(os, call, fail)
    path = folder if call == "stat" else folder / TENSORS
    with pytest.raises(Unreadable) as caught:
        fault(folder)
    says = f"host {platform.node()} cannot read {path} ({os.strerror(number)}), which says nothing of the checkpoint"
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_name_that_no_file_system_takes_is_a_fault(folder):
    content = json.loads((folder / MANIFEST).read_text())
    content["files"]["x" * 300] = {"bytes": 0, "crc32": "00000000"}
    (folder / MANIFEST).write_text(json.dumps(content))
    assert fault(folder) == f"{'x' * 80} cannot be opened (File name too long)"


def test_the_checksum_is_the_documented_one(tmp_path, monkeypatch):
    """CRC-32 of the CRC-32s of the blocks, also where a read returns less than was asked for."""
    content = bytes(range(256)) * 11
    (tmp_path / "x").write_bytes(content)
    (tmp_path / "none").write_bytes(b"")
    monkeypatch.setattr(manifest, "_BLOCK_BYTES", 1000)
    blocks = [content[start : start + 1000] for start in (0, 1000, 2000)]
    expected = zlib.crc32(b"".join(zlib.crc32(block).to_bytes(4, "big") for block in blocks))
    entries = {"x": {"bytes": 2816, "crc32": f"{expected:08x}"}, "none": {"bytes": 0, "crc32": "00000000"}}
    assert measure(tmp_path, ["x", "none"]) == entries
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: pread(file, min(size, 300), start))
    assert measure(tmp_path, ["x", "none"]) == entries


def test_the_ranks_share_the_reading(folder):
    files = {f"f{index}": {"bytes": size} for index, size in enumerate([9, 8, 7, 1, 1, 1, 0])}
    shares = [share(files, rank, 3) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in part) for part in shares]
    assert max(loads) - min(loads) <= 2
    (folder / TENSORS).write_bytes(bytes(1000))
    found = [fault(folder, rank=rank, num_ranks=4) for rank in range(4)]
    assert sorted(map(str, found)) == ["None"] * 3 + [f"{TENSORS} has not the checksum that manifest.json says"]


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    calls, fsync = [], os.fsync

    def note(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    folder = write_checkpoint(tmp_path, 3)
    assert sorted(calls[:5]) == sorted([*FILES, TENSORS])
    assert calls[5:] == ["manifest.json.partial", "step_3.partial", "checkpoints"] and folder.is_dir()


def test_what_is_put_away_half_is_no_checkpoint_by_its_name(folder, monkeypatch):
    monkeypatch.setattr(manifest, "delete", lambda folder: None)
    put_away(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["step_3.gone.partial"]


def test_a_name_that_is_taken_is_replaced(tmp_path):
    folder = write_checkpoint(tmp_path, 3)
    (folder / "old").write_text("x")
    again = write_checkpoint(tmp_path, 3)
    assert again == folder and not (folder / "old").exists() and fault(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["step_3"]


def test_an_entry_for_a_file_that_is_not_there_is_refused_while_sealing(tmp_path):
    (tmp_path / "p").mkdir()
    with pytest.raises(FileNotFoundError):
        seal(tmp_path / "p", tmp_path / "f", measure(tmp_path / "p", ["x"]))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("late", [True, False])
def test_a_file_that_another_host_has_written_is_waited_for_and_missed(tmp_path, monkeypatch, late):
    """late: it has its size at the third look, as a network file system may show it."""
    partial, final, looks = tmp_path / "p", tmp_path / "f", []
    partial.mkdir()
    (partial / "x").write_bytes(b"12")

    def sleep(seconds):
        looks.append(seconds)
        if late and len(looks) == 2:
            (partial / "x").write_bytes(b"123")

    monkeypatch.setattr(manifest, "LAG_S", 60.0 if late else 0.01)
    monkeypatch.setattr(manifest.time, "sleep", sleep)
    entries = {"x": {"bytes": 3, "crc32": "00000000"}}
    if late:
        seal(partial, final, entries)
        assert (final / "x").read_bytes() == b"123" and len(looks) == 2
        return
    with pytest.raises(ValueError, match=rf"^x: host {platform.node()} sees 2 bytes of its 3, .*one folder that"):
        seal(partial, final, entries)
    assert not final.exists() and not (partial / MANIFEST).exists()
