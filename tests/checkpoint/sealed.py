"""Checkpoints without a model: the files that every one has, a tensor file of random bytes, and their manifest."""

from __future__ import annotations

import json
import random
from pathlib import Path

from sbtrain.checkpoint.manifest import measure, seal
from sbtrain.checkpoint.state import RunState

TENSORS = "__0_0.distcp"


def write_checkpoint(run_dir: Path, step: int, *, stage: str = "a", stage_tokens: int = 0, **content) -> Path:
    """checkpoints/step_N of a run directory; content: of state.json, besides what it always has."""
    folder = run_dir / "checkpoints" / f"step_{step}"
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    state = RunState(stage=stage, step=step, tokens=10 * step, stage_tokens=stage_tokens)
    state = {"format": 1, "parts": ["model"], **state.to_json(), **content}
    (partial / "state.json").write_text(json.dumps(state))
    (partial / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (partial / "common.pt").write_bytes(b"common")
    (partial / ".metadata").write_bytes(b"index")
    (partial / TENSORS).write_bytes(random.Random(step).randbytes(1000))
    seal(partial, folder, measure(partial, [path.name for path in partial.iterdir()]))
    return folder


def edit(path: Path, **changes) -> None:
    """Change values of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
