"""Checkpoints that somebody made to run code or to read other files: refused in one line, whatever their checksums say.

Their manifests hold, as whoever writes the files writes them too.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.checkpoint.manifest import MANIFEST, fault, measure, seal
from sbtrain.convert.reader import CheckpointReader
from store_case import Saved


class Trap:
    """What unpickles this makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def saved(tmp_path):
    with Mesh.build(Layout()) as mesh:
        yield Saved(tmp_path, mesh)


def reseal(folder: Path) -> None:
    """Give the folder a manifest of what it holds now."""
    (folder / MANIFEST).unlink()
    aside = folder.rename(folder.with_name("aside"))
    seal(aside, folder, measure(aside, [path.name for path in aside.iterdir()]))
    assert fault(folder) is None


def edit_index(folder: Path, change: Callable) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(index) or index))


def spoil_index(folder: Path, marker: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(marker)))


def spoil_within_index(folder: Path, marker: Path) -> None:
    edit_index(folder, lambda index: setattr(index, "planner_data", Trap(marker)))


def spoil_common(folder: Path, marker: Path) -> None:
    torch.save({"optimizer": Trap(marker)}, folder / "common.pt")


def spoil_common_without_zip(folder: Path, marker: Path) -> None:
    (folder / "common.pt").write_bytes(pickle.dumps(Trap(marker)))


def spoil_object(folder: Path, marker: Path) -> None:
    """One of the objects beside the tensors, within a tensor file."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    names = [name for name, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    payload = pickle.dumps(Trap(marker))
    for name in names:
        place = index.storage_data[MetadataIndex(name)]
        assert len(payload) <= place.length
        with open(folder / place.relative_path, "r+b") as file:
            file.seek(place.offset)
            file.write(payload)


TRAPS = [spoil_index, spoil_within_index, spoil_common, spoil_common_without_zip, spoil_object]


@pytest.mark.parametrize("spoil", TRAPS)
@pytest.mark.parametrize("forced", [False, True])
def test_no_code_of_a_checkpoint_runs(saved, tmp_path, monkeypatch, spoil, forced):
    """Not even where the user's shell tells torch to load like that."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, marker = saved.save(3), tmp_path / "marker"
    spoil(folder, marker)
    reseal(folder)
    with pytest.raises(ValueError) as caught:
        saved.load()
    text = str(caught.value)
    assert not marker.exists() and text.startswith(f"{folder} cannot be read (") and "\n" not in text
    if spoil in (spoil_index, spoil_within_index):
        assert "which no checkpoint needs" in text
        with pytest.raises(ValueError, match="use another checkpoint"):
            CheckpointReader(folder)
    assert not marker.exists()


def test_the_traps_would_have_worked(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "a")))
    with suppress(pickle.UnpicklingError, RuntimeError):  # it is too late then
        torch.load(io.BytesIO(pickle.dumps(Trap(tmp_path / "b"))), weights_only=False)
    assert (tmp_path / "a").is_dir() and (tmp_path / "b").is_dir()


GLOBALS = [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch.serialization", "os.system"),
           ("torch.distributed.checkpoint.metadata", "os.system"), ("torch.distributed.checkpoint.filesystem", "open"),
           ("builtins", "getattr"), ("functools", "partial")]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), GLOBALS)
@pytest.mark.parametrize("protocol", [0, 4])
def test_only_known_names_are_looked_up(saved, module, name, protocol):
    """Protocol 4 names attributes of attributes, which would find os in a harmless module."""
    folder = saved.save(3)
    text = b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
    stream = b"\x80\x04" + text + b"\x93." if protocol == 4 else f"c{module}\n{name}\n.".encode()
    (folder / ".metadata").write_bytes(stream)
    with pytest.raises(ValueError, match="not to be trusted: it names .*, which no checkpoint needs"):
        CheckpointReader(folder)


@pytest.mark.parametrize("way", ["up", "absolute", "folder"])
def test_no_file_outside_of_the_folder_is_read(saved, tmp_path, way):
    folder = saved.save(3)
    (name,) = {path.name for path in folder.glob("__0_0.distcp")}
    shutil.copy(folder / name, tmp_path / "secret.distcp")
    to = {"up": "../../secret.distcp", "absolute": str(tmp_path / "secret.distcp"), "folder": "."}[way]

    def redirect(index):
        for place in index.storage_data.values():
            place.relative_path = to

    edit_index(folder, redirect)
    reseal(folder)
    for read in (saved.load, lambda: CheckpointReader(folder)):
        with pytest.raises(ValueError, match="not to be trusted: it names .* outside of the folder"):
            read()


def test_a_link_within_the_folder_is_not_followed(saved, tmp_path):
    folder = saved.save(3)
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    assert fault(folder) == "__0_0.distcp is no regular file"
    with pytest.raises(ValueError, match="__0_0.distcp is no regular file"):
        CheckpointReader(folder)


def oversized(index) -> None:
    entry = index.state_dict_metadata["decoder.final_layernorm.weight"]
    entry.size = torch.Size([1 << 60])


ODD = {
    "a list": lambda index: [1],
    "no tensors": lambda index: setattr(index, "state_dict_metadata", 3),
    "no places": lambda index: setattr(index, "storage_data", None),
    "odd entries": lambda index: index.state_dict_metadata.update({"x": 3}),
    "before the file": lambda index: setattr(next(iter(index.storage_data.values())), "offset", -5),
    "behind the file": lambda index: setattr(next(iter(index.storage_data.values())), "offset", 1 << 40),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_index_that_makes_no_sense_is_one_line(saved, kind):
    folder = saved.save(3)
    edit_index(folder, ODD[kind])
    with pytest.raises(ValueError) as caught:
        CheckpointReader(folder)
    assert str(caught.value).startswith(f"{folder} cannot be read (") and "\n" not in str(caught.value)


def test_a_tensor_larger_than_any_memory_is_one_line(saved):
    folder = saved.save(3)
    edit_index(folder, oversized)
    with pytest.raises(ValueError, match="cannot read tensor decoder.final_layernorm.weight"):
        CheckpointReader(folder).get("decoder.final_layernorm.weight")
