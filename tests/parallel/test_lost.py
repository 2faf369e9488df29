"""Which errors are a lost peer's, by the messages that torch, NCCL and gloo raise."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from parallel.lost import gave_up_waiting, lost_a_peer
from sbtrain.config.schema import RuntimeConfig

NCCL = "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, "
SYSTEM = (
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. It can be "
    "also caused by unexpected exit of a remote peer, you can check NCCL warnings for failure reason and see if there "
    "is connection closed by a peer.\nLast error:\n"
)
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
WATCHDOG = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=600000) ran for 600029 milliseconds before timing out."
)
ASYNC = "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=600000) raised the following async exception: "
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] "

LOST = [
    dist.DistNetworkError("failed to recv, got 0 bytes"),
    dist.DistBackendError(NCCL + "remote process exited or there was a network error, NCCL version 2.27.5\n" + REMOTE),
    dist.DistBackendError(
        NCCL + "unhandled system error\n" + SYSTEM + "socketRecv: Connection closed by remote peer b"
    ),
    dist.DistBackendError(ASYNC + "NCCL error: remote process exited or there was a network error"),
    RuntimeError(GLOO + "Connection closed by peer [10.0.0.2]:4071"),
    RuntimeError(GLOO + "Read error [10.0.0.2]:4071: Connection reset by peer"),
    RuntimeError(GLOO + "writev [10.0.0.2]:4071: Broken pipe"),
]
LATE = [
    dist.DistBackendError(WATCHDOG),
    RuntimeError(
        "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"
    ),
    RuntimeError(GLOO + "Application timeout caused pair closure"),
    dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0//cuda//0"),
]
OWN = [
    dist.DistBackendError(NCCL + "unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\n"
                          "Last error:\nFailed to CUDA calloc async 608 bytes"),
    dist.DistBackendError(NCCL + "unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    dist.DistBackendError(NCCL + "invalid usage\nncclInvalidUsage: This usually reflects invalid usage."),
    dist.DistBackendError(NCCL + "internal error\nncclInternalError: Internal check failed.\nLast error:\n"),
    dist.DistBackendError(NCCL + "unhandled system error\n" + SYSTEM + "Error while creating shared memory segment: "
                          "No space left on device"),
    dist.DistBackendError(ASYNC + "CUDA error: an illegal memory access was encountered"),
    dist.DistBackendError(ASYNC + "CUDA error: the launch timed out and was terminated"),
    RuntimeError("the connection closed by peer is not gloo's"),
    ValueError("seed=-1 is negative"),
]  # fmt: skip


@pytest.mark.parametrize(("errors", "lost", "late"), [(LOST, True, False), (LATE, True, True), (OWN, False, False)])
def test_errors(errors, lost, late):
    for error in errors:
        assert lost_a_peer(error) is lost, error
        assert gave_up_waiting(error) is late, error
        outer = RuntimeError("a checkpoint failed")
        outer.__cause__ = error
        assert lost_a_peer(outer) is lost, error


@pytest.mark.parametrize(("timeout_s", "patience_s"), [(1.0, 21600.0), (600.0, 21600.0), (10000.0, 30000.0)])
def test_torch_waits_for_hours_whatever_the_timeout(timeout_s, patience_s):
    """A checkpoint may take one rank longer than the others wait for one another elsewhere."""
    assert RuntimeConfig(timeout_s=timeout_s).patience_s == patience_s
