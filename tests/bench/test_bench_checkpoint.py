"""bench checkpoint on a tiny model: the table's figures are there, and nothing stays behind."""

from __future__ import annotations

import json

import pytest

from sbtrain.bench.checkpoint import FILE, CheckpointOptions, bench_checkpoint


def test_the_table_has_what_was_measured(tmp_path, capfd):
    folder = tmp_path / "disk"
    options = CheckpointOptions(
        model="tiny", dp=2, bucket_elements=5000, snapshots=2, folder=str(folder), out=str(tmp_path)
    )
    assert bench_checkpoint(options, "bench.py checkpoint") == 0
    report = json.loads((tmp_path / FILE).read_text())
    assert list(report["rows"]) == ["flash", "waited", "sync", "async"] and report["num_ranks"] == 1
    assert all(set(row) == {"first_s", "blocked_s", "written_s"} for row in report["rows"].values())
    assert report["rank_bytes"] > 0 and report["pinned_copy_bytes_per_s"] > 0
    assert "of pinned copy" in capfd.readouterr().out
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("key", "value"), [("peers", ("other",)), ("dp", 0), ("model", "no such model")])
def test_bad_options_are_refused_by_name(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        bench_checkpoint(CheckpointOptions(**{"out": str(tmp_path), key: value}), "")
