"""What a process is told so that it gives the same bits again, and when."""

from __future__ import annotations

import os

import pytest
import torch

from parallel import mesh
from parallel.exact import VARIABLES, compute_exactly
from rank_pool import poison_memory


@pytest.fixture
def untold(monkeypatch):
    """A process that was told nothing yet; tests are told something for another reason."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    poison_memory(False)


def test_a_process_is_deterministic_and_fills_no_memory_for_it(untold):
    torch.utils.deterministic.fill_uninitialized_memory = True
    for _ in range(2):
        compute_exactly()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled(), "a run does not end for want of a kernel"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not any(name in os.environ for name in VARIABLES), "they are for GPUs"


def test_what_was_asked_for_before_stays(untold, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    poison_memory()
    compute_exactly()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["NCCL_ALGO"] == "Tree" and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_only_those_who_ask_are_told(untold):
    mesh.start_distributed()
    assert not torch.are_deterministic_algorithms_enabled()
    mesh.start_distributed(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
