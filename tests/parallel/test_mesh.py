"""Where a process stands."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel.layout import Layout
from parallel.mesh import Mesh, check_one_rank_a_gpu, start_distributed


def test_a_gpu_of_its_own_for_every_rank():
    check_one_rank_a_gpu([("host_a", "gpu_1"), ("host_a", "gpu_2"), ("host_b", "gpu_1")])
    with pytest.raises(ValueError, match="ranks 1 and 2 share one GPU of host_a.*CUDA_VISIBLE_DEVICES="):
        check_one_rank_a_gpu([("host_b", "gpu_1"), ("host_a", "gpu_1"), ("host_a", "gpu_1")])


@pytest.mark.parametrize(("watched", "kept"), [(True, "2"), (False, None)])
def test_only_a_watched_process_changes_what_nccl_does_about_errors(monkeypatch, watched, kept):
    """Without a watch nothing else would end a process whose collective failed."""
    name, started = "TORCH_NCCL_ASYNC_ERROR_HANDLING", {}
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid="gpu_1"))
    monkeypatch.setattr("parallel.mesh.device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda everyone, mine: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: started.update(of=os.environ.get(name)))
    start_distributed(watched=watched)
    assert started == {"of": kept}


@pytest.mark.parametrize(("device", "num_ranks", "kept"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)])
def test_an_error_of_one_gpu_of_several_waits_for_no_group(device, num_ranks, kept):
    """NCCL would wait there for ranks that wait for this one. Another mesh can be built whatever happened."""
    with pytest.raises(TypeError), Mesh.build(Layout()) as mesh:
        group = mesh.groups.tp
        mesh.device, mesh.world_size = torch.device(device), num_ranks
        raise TypeError
    assert (group in dist.distributed_c10d._world.pg_map) is kept
    with Mesh.build(Layout()):
        pass
