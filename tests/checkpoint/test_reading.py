"""What goes wrong while a checkpoint is read: its fault, this host's, or the machine's."""

from __future__ import annotations

import errno
import os
import platform

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from sbtrain.checkpoint.manifest import Unreadable
from sbtrain.checkpoint.reading import readable

FAULTS = (
    ValueError("odd\nbytes"),
    RuntimeError("PytorchStreamReader failed"),
    OSError(errno.EINVAL, "Invalid argument"),
)


def of_ranks(error: BaseException) -> CheckpointException:
    """As torch's own loader tells what rank 3 met."""
    return CheckpointException("read", {3: (error, None)})


@pytest.mark.parametrize("wrap", [lambda error: error, of_ranks])
@pytest.mark.parametrize("error", FAULTS)
def test_a_fault_of_the_files_is_one_line(tmp_path, error, wrap):
    with pytest.raises(ValueError) as caught, readable(tmp_path):
        raise wrap(error)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path} cannot be read (") and "ledger.json" in text and "\n" not in text
    assert not isinstance(caught.value, Unreadable)


@pytest.mark.parametrize(("wrap", "who"), [(lambda error: error, f"host {platform.node()}"), (of_ranks, "rank 3")])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_one_host_cannot_read_says_nothing_of_the_checkpoint(tmp_path, number, wrap, who):
    with pytest.raises(Unreadable) as caught, readable(tmp_path):
        raise wrap(OSError(number, os.strerror(number)))
    assert str(caught.value).startswith(f"{who} cannot read {tmp_path} ({os.strerror(number)}), which says nothing of")


def test_a_host_without_memory_is_no_damaged_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"), readable(tmp_path):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("wrap", [lambda error: error, of_ranks])
@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, torch.AcceleratorError])
def test_errors_of_memory_and_gpu_stay_what_they_are(tmp_path, kind, wrap):
    with pytest.raises(kind), readable(tmp_path):
        raise wrap(kind("CUDA error: an illegal memory access was encountered"))
