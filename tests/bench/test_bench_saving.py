"""bench saving on a tiny model: steps beside the writing are counted, and nothing stays behind."""

from __future__ import annotations

import json

import pytest

from sbtrain.bench.saving import FILE, SavingOptions, bench_saving
from sbtrain.config.schema import Precision


def test_steps_are_timed_beside_the_writing(tmp_path, capfd):
    folder = tmp_path / "disk"
    sizes = dict(model="tiny", layers=2, seq_len=16, precision=Precision.fp32, steps=2, saves=2)
    assert bench_saving(SavingOptions(**sizes, folder=str(folder), out=str(tmp_path)), "bench.py saving") == 0
    report = json.loads((tmp_path / FILE).read_text())
    assert report["num_steps_beside"] >= 4, "of every checkpoint: one until all have written, one until it has its name"
    assert report["rank_bytes"] > 0 and report["written_s"]["min"] > report["blocked_s"]["min"] > 0
    assert report["waited_s"]["min"] > 0
    assert "waited for" in capfd.readouterr().out
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("key", "value"), [("saves", 0), ("steps", -1)])
def test_bad_options_are_refused_by_name(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        bench_saving(SavingOptions(**{"out": str(tmp_path), key: value}), "")
