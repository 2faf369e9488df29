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


@pytest.mark.parametrize("wrap", [lambda error: error, of_ranks])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_this_host_cannot_read_says_nothing_of_the_checkpoint(tmp_path, number, wrap):
    with pytest.raises(Unreadable) as caught, readable(tmp_path):
        raise wrap(OSError(number, os.strerror(number)))
    assert str(caught.value).startswith(f"host {platform.node()} cannot read {tmp_path} ({os.strerror(number)}), which")


@pytest.mark.parametrize("wrap", [lambda error: error, of_ranks])
@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, torch.AcceleratorError])
def test_errors_of_memory_and_gpu_stay_what_they_are(tmp_path, kind, wrap):
    with pytest.raises(kind), readable(tmp_path):
        raise wrap(kind("CUDA error: an illegal memory access was encountered"))
