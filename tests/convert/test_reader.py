"""Reading torch.distributed.checkpoint folders without a process group, whoever wrote them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sbtrain.convert.reader import CheckpointReader

STATE = {"a.weight": torch.arange(24.0).view(6, 4), "b.bias": torch.ones(5, dtype=torch.bfloat16), "step": 3}


def _save_sharded(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {
        "rows": distribute_tensor(torch.arange(35.0).view(7, 5), mesh, [Shard(0)]),
        "columns": distribute_tensor(torch.arange(35.0).view(7, 5), mesh, [Shard(1)]),
    }
    dcp.save(state, checkpoint_id=folder)


@pytest.fixture
def folder(tmp_path):
    dcp.save(dict(STATE), checkpoint_id=tmp_path / "step_7", no_dist=True)
    return tmp_path / "step_7"


def test_reads_single_tensors(folder):
    reader = CheckpointReader(folder)
    assert reader.names() == ["a.weight", "b.bias"] and reader.shape("a.weight") == (6, 4) and "step" not in reader
    for name in reader.names():
        assert torch.equal(reader.get(name), STATE[name]) and reader.get(name).dtype == STATE[name].dtype


def test_joins_what_ranks_wrote(run_ranks, tmp_path):
    run_ranks(2)(_save_sharded, str(tmp_path))
    reader = CheckpointReader(tmp_path)
    for name in ("rows", "columns"):
        assert torch.equal(reader.get(name), torch.arange(35.0).view(7, 5))


def test_unknown_tensor(folder):
    with pytest.raises(ValueError, match="step_7 holds no tensor c.weight; was it written by another"):
        CheckpointReader(folder).get("c.weight")


def test_other_formats(tmp_path, folder):
    with pytest.raises(ValueError, match=r"is not a finished torch\.distributed\.checkpoint \(no \.metadata\); give"):
        CheckpointReader(tmp_path)
    (folder / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(
        ValueError, match=r"step_7 cannot be read \(\.metadata is damaged \(\w+\)\); use another checkpoint"
    ):
        CheckpointReader(folder)


@pytest.mark.parametrize("keep_bytes", [0, 300])
def test_truncated_data(folder, keep_bytes):
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:keep_bytes])
    with pytest.raises(
        ValueError, match=r"\.distcp has \d+ bytes, fewer than the \d+ in use\); use another checkpoint"
    ) as caught:
        [CheckpointReader(folder).get(name) for name in STATE if name != "step"]
    assert "\n" not in str(caught.value)
