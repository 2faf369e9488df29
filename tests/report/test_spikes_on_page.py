"""What the page of a run shows of suite spiking: tables, plots, and a damaged file said plainly."""

from __future__ import annotations

import json

import pytest
import torch

import ops
from sbtrain.report import write_report
from sbtrain.spiking.statistics import SpikeStatistics, tallies

PLOTS = {"spiking_windows.png", "spiking_counts.png", "spiking_cost.png", "spiking_raster.png"}


def point(x: torch.Tensor, k: float, mean: float) -> dict:
    statistics = SpikeStatistics(x.shape[-1])
    statistics.add(ops.spike_count(x, k=k)[0])
    figures = tallies([statistics])[0].figures().plain()
    results = [{"source": "w<i>ki", "length": 64, "bits_per_byte": mean}]
    named = {"projections": {"qkv": figures}, "layers": {"0": figures}, "sites": {"0.qkv": figures}}
    return {"k": k, "layer_k": {}, "results": results, "mean": mean, "cost": mean / 1.5 - 1, "total": figures, **named}


@pytest.fixture(scope="module")
def measured() -> dict:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    off = {"results": [{"source": "w<i>ki", "length": 64, "bits_per_byte": 1.5}], "mean": 1.5}
    rasters = [{"layer": 0, "site": "qkv", "counts": ops.spike_count(x[:4, :8])[0].tolist()}]
    sweep = [point(x, 2.0, 1.6), point(x, 3.0, 1.53)]
    model = "runs/demo/checkpoints/step_49"
    return {"suite": "spiking", "model": model, "off": off, "sweep": sweep, "shown": 1, "rasters": rasters}


def page_of(tmp_path, content: str) -> str:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "spiking.json").write_text(content)
    return write_report(tmp_path).read_text(encoding="utf-8")


def test_the_page_shows_spikes(tmp_path, measured):
    page = page_of(tmp_path, json.dumps(measured))
    assert {path.name for path in (tmp_path / "report").iterdir()} == PLOTS | {"index.html"}
    assert page.count("<img") == len(PLOTS) and page.count("<table>") == 3
    total = measured["sweep"][1]["total"]
    for text in ("<h2>Spikes</h2>", "+2.00%", "+6.67%", f"{total['silent_windows']:.2%}", "k = 3", "step_49"):
        assert text in page
    assert "w&lt;i&gt;ki 64" in page and "w<i>" not in page


@pytest.mark.parametrize("damaged", ["{", "[]", '{"sweep": []}'])
def test_a_damaged_file_is_said_and_not_fatal(tmp_path, damaged):
    page = page_of(tmp_path, damaged)
    assert "spiking.json cannot be read" in page and "spikes are not shown" in page and "<img" not in page
