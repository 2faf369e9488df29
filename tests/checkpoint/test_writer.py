"""What the writer process of a rank does with a message, without the process."""

from __future__ import annotations

import platform

import pytest

from flash_case import Held
from parallel.mesh import start_distributed
from sbtrain.checkpoint import manifest
from sbtrain.checkpoint.manifest import fault
from sbtrain.checkpoint.share import Share
from sbtrain.checkpoint.tensor_files import Written, write_files
from sbtrain.checkpoint.writer import Seal, _answer

SMALL = {"state.json": {}, "common.pt": b"", "metadata.json": {}}


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_gets_its_name_where_all_that_ranks_wrote_is_in_it(tmp_path, monkeypatch, shared):
    """shared: otherwise another host has written its file into a folder of its own."""
    start_distributed()
    partial, final, share = tmp_path / "step_1.partial", tmp_path / "step_1", Share.of(Held())
    partial.mkdir()
    written = [write_files(partial, share.files, share.read)]
    if not shared:
        written.append(Written((), {"__1_0.distcp": {"bytes": 5, "crc32": "00000000"}}))
    monkeypatch.setattr(manifest, "LAG_S", 0.0)
    problem = _answer(Seal(1, partial, final, SMALL, share.metadata, written), None, None).problem
    if shared:
        assert problem is None and fault(final) is None
        return
    assert problem.startswith(f"__1_0.distcp: host {platform.node()} does not see it, ")
    assert problem.endswith("run_dir must be one folder that all hosts share") and not final.exists()
