"""The same bits again: what torch, cuBLAS and NCCL are told, so that a run that goes on computes what it would have."""

from __future__ import annotations

import os

import torch

VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
"""Workspaces of cuBLAS that torch takes for deterministic; one order of summation over ranks, whatever the message.

Left to itself NCCL may sum in the switch or along trees, by its estimate of what is fast.
"""


def compute_exactly() -> None:
    """Let this process give the same bits for the same inputs on the same layout. Idempotent.

    Called before the process first uses a GPU: cuBLAS and NCCL read their variables once. A variable that is set stays.
    Kernels of ours sum in a fixed order anyway; ops.attention leaves out cuDNN. Where torch has only a kernel that does
    not, it says so once and goes on.
    """
    if torch.cuda.is_available():
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)
    if not torch.are_deterministic_algorithms_enabled():
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass over memory, and changes no result
        torch.use_deterministic_algorithms(True, warn_only=True)
