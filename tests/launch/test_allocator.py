"""The allocator's setting: a default for NVIDIA GPUs that the caller's own wins over, set before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SHOW = "import sys, os, _allocator; print(os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("given", "set_to"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
        ({"MACA_PATH": "/opt/maca"}, "None"),
    ],
)
def test_the_default_and_what_wins_over_it(given, set_to):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "MACA_PATH")
    environment = {key: value for key, value in os.environ.items() if key not in names} | given
    shown = subprocess.run([sys.executable, "-c", SHOW], cwd=LAUNCH, env=environment, capture_output=True, text=True)
    assert shown.stdout.split() == [set_to, "False"], shown.stderr


@pytest.mark.parametrize("script", ["train.py", "bench.py"])
def test_it_comes_before_everything_that_may_import_torch(script):
    imports = [line for line in (LAUNCH / script).read_text().splitlines() if line.startswith(("import ", "from "))]
    ours = [line.split()[1] for line in imports if line.split()[1] not in sys.stdlib_module_names]
    assert ours[0] == "_allocator"
