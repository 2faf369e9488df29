"""Reading Hugging Face folders: slices, shards, and one clear line for every way a folder can be broken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from sbtrain.convert.hf import INDEX, SINGLE, HFCheckpoint


@pytest.fixture
def sharded(tmp_path):
    """Two shards with an index; tensors a and b are in the first, c in the second."""
    tensors = {name: torch.randn(6, 4) for name in "abc"}
    save_file({name: tensors[name] for name in "ab"}, tmp_path / "first.safetensors")
    save_file({"c": tensors["c"]}, tmp_path / "second.safetensors")
    files = {"a": "first.safetensors", "b": "first.safetensors", "c": "second.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    return tmp_path, tensors


def _refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        HFCheckpoint(folder)
    assert "\n" not in str(caught.value)


def test_reads_whole_tensors_and_slices(sharded):
    folder, tensors = sharded
    reader = HFCheckpoint(folder)
    assert reader.names() == ["a", "b", "c"] and reader.shape("c") == (6, 4) and "d" not in reader
    for name, tensor in tensors.items():
        assert torch.equal(reader.get(name), tensor)
        assert torch.equal(reader.get_slice(name, 0, 2, 5), tensor[2:5])
        assert torch.equal(reader.get_slice(name, 1, 1, 3), tensor[:, 1:3])


def test_unknown_tensor_is_named_with_its_index(sharded):
    with pytest.raises(ValueError, match=rf"{INDEX} holds no tensor d; .*start.path"):
        HFCheckpoint(sharded[0]).get("d")


def test_no_folder_and_no_weights(tmp_path):
    _refused(tmp_path / "nowhere", "start.path: .*nowhere is not a folder")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    _refused(tmp_path, f"holds neither {SINGLE} nor {INDEX}; only safetensors are read")


def test_missing_shard(sharded):
    (sharded[0] / "second.safetensors").unlink()
    _refused(sharded[0], r"second\.safetensors is missing but model\.safetensors\.index\.json names it; download")


@pytest.mark.parametrize("keep_bytes", [0, 5, 40, -1])
def test_truncated_shard(sharded, keep_bytes):
    path = sharded[0] / "first.safetensors"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    _refused(sharded[0], r"first\.safetensors is truncated or .*download it again")


def test_longer_file_than_promised(sharded):
    path = sharded[0] / "first.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    _refused(sharded[0], r"first\.safetensors is truncated or corrupt: its header promises \d+ bytes, the file has \d+")


def test_corrupt_header(sharded):
    path = sharded[0] / "first.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"?" * 20 + raw[28:])
    _refused(sharded[0], r"first\.safetensors has a corrupt safetensors header")
    path.write_bytes(b"<html>this is no weights file</html>" * 9)
    _refused(sharded[0], r"first\.safetensors is truncated or not safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_corrupt_index(sharded, text):
    (sharded[0] / INDEX).write_text(text)
    _refused(sharded[0], rf"{INDEX} is not a safetensors index")


def test_index_names_a_tensor_that_its_shard_lacks(sharded):
    save_file({"a": torch.zeros(2)}, sharded[0] / "first.safetensors")
    _refused(sharded[0], r"index\.json says that first\.safetensors holds tensor b, and it does not")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights(tmp_path, dtype):
    save_file({"a": torch.zeros(2), "w": torch.zeros(4).to(dtype)}, tmp_path / SINGLE)
    _refused(tmp_path, r"tensor w has dtype (I8|F8_E4M3), expected one of F64, F32, F16, BF16; .*unquantized")
