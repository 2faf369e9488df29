"""Where a process stands."""

import pytest

from parallel.mesh import check_one_rank_a_gpu


def test_a_gpu_of_its_own_for_every_rank():
    check_one_rank_a_gpu([("host_a", "gpu_1"), ("host_a", "gpu_2"), ("host_b", "gpu_1")])
    with pytest.raises(ValueError, match="ranks 1 and 2 share one GPU of host_a.*CUDA_VISIBLE_DEVICES="):
        check_one_rank_a_gpu([("host_b", "gpu_1"), ("host_a", "gpu_1"), ("host_a", "gpu_1")])
