"""The command that measures what looking out costs."""

from __future__ import annotations

import json

import pytest

from sbtrain.bench.options import parse
from sbtrain.bench.watch import FILE, WatchOptions, bench_watch, summary


def test_every_setting_has_its_time_in_every_round(tmp_path, capsys):
    arguments = ["model=tiny", "layers=2", "seq_len=16", "steps=2", "rounds=2", "precision=fp32", f"out={tmp_path}"]
    assert bench_watch(parse(WatchOptions, [*arguments, "every=0,1"]), "command") == 0
    report = json.loads((tmp_path / FILE).read_text())
    assert [list(times) for times in report["step_ms"]] == [["0", "1"], ["1", "0"]]
    assert "measure_every_steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="write every=0,10,1"):
        bench_watch(parse(WatchOptions, [*arguments, "every=3"]), "command")


def test_overhead_is_against_the_first_setting_round_by_round():
    text = summary((0, 10), [{"0": 100.0, "10": 101.0}, {"0": 200.0, "10": 204.0}, {"0": 100.0, "10": 103.0}])
    assert "10" in text and "103.00  +2.00%  +1.00% to +3.00%" in text
