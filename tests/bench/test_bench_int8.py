"""The command that measures models on INT8 weights."""

from __future__ import annotations

import json

import pytest

from sbtrain.bench.int8 import FILE, Int8Options, bench_int8
from sbtrain.bench.options import parse

TINY = ["model=tiny", "layers=2", "prompts=12,20", "chunk_tokens=8", "precision=fp32", "steps=2", "warmup=1"]


def test_every_kind_reads_and_writes(tmp_path, capsys):
    arguments = [*TINY, "decode=3", "weight_group=32", f"out={tmp_path}"]
    assert bench_int8(parse(Int8Options, arguments), "command") == 0
    report = json.loads((tmp_path / FILE).read_text())
    found = [(result["weights"], result["num_tokens"]) for result in report["results"]]
    assert found == [(kind, size) for kind in ("plain", "floats", "int8") for size in (12, 20)]
    assert all(result[part]["median"] > 0 for result in report["results"] for part in ("prompt_ms", "decode_ms"))
    assert report["model"]["gla"]["gate"] == "full_rank"
    assert "decode ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["weights=bf16"], "weights=bf16 is not known; choose from plain, floats, int8"),
        (["weight_group=7"], "model.spiking.weight_group=7 does not divide the 32 input channels"),
        (["weight_group=8", "weights=int8"], "groups of 8 channels; use a multiple of 32"),
        (["decode=0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_measured(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        bench_int8(parse(Int8Options, [*TINY, f"out={tmp_path}", *changes]), "command")
