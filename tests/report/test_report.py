"""The report of a run directory: numbers against hand calculation, missing parts, hostile names, real pictures."""

from __future__ import annotations

import json
import struct
from html.parser import HTMLParser

import pytest
import yaml

from sbtrain.report import summary_table, write_report
from sbtrain.report.run_files import read_run
from sbtrain.report.tables import bits_rows, layout_text, stage_rows

PLOTS = {"loss.png", "lr.png", "tokens_per_s.png", "grad_norm.png", "bits_per_byte.png"}


def record(step, stage, step_time_s, **more):
    values = {
        "step": step, "tokens": 1000 * step, "stage": stage, "loss": 4.0 - 0.1 * step, "grad_norm": 2.0, "lr": 1e-4,
        "step_time_s": step_time_s, "tokens_per_s_per_gpu": 1000 / step_time_s / 4, "tflops_per_gpu": 1.0, "mfu": 0.5,
        "peak_memory_bytes": 1, "world_size": 4,
    }  # fmt: skip
    return {**values, **more}


def point(name, tokens, wiki, plays):
    sources = {"wiki": wiki, "plays": plays}
    measured = {source: {"bits_per_byte": bits, "tokens": 10, "bytes": 40} for source, bits in sources.items()}
    return {"name": name, "tokens": tokens, "sources": measured, "mean": (wiki + plays) / 2}


def write_run(folder, stages=("ctx_8k", "ctx_32k")):
    first, second = stages
    recipe = {
        "name": "demo",
        "model": {"pattern": "LS x 14"},
        "stages": {
            first: {"seq_len": 8192, "tokens": 3000, "layout": {"tp": 2, "pp": 1, "ep": 1, "sp": 1}},
            second: {"seq_len": 32768, "tokens": 2000, "layout": {"tp": 1, "pp": 1, "ep": 1, "sp": 4}},
        },
    }
    records = [
        record(1, first, 50.0, first_step=True), record(2, first, 2.0, mfu=0.2), record(3, first, 6.0, mfu=0.4),
        record(4, second, 5.0, first_step=True), record(5, second, 5.0),
    ]  # fmt: skip
    points = [point("start", 0, 3.0, 4.0), point(first, 3000, 2.0, 3.5), point("teacher", 0, 1.0, 2.0)]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    ledger = {"stages_done": [first], "checkpoint": "checkpoints/step_3", "step": 3}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    (folder / "evaluation.json").write_text(json.dumps({"points": points}))
    return folder


class Page(HTMLParser):
    """Text of a page, its tags, and every address it would load."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_stage_numbers(tmp_path):
    first, second = stage_rows(read_run(write_run(tmp_path)))
    assert (first.name, first.state, first.layout, first.num_steps) == ("ctx_8k", "done", "dp 2 · tp 2", 3)
    assert (first.tokens, first.planned_tokens, first.time_s) == (3000, 3000, 58.0)
    assert first.tokens_per_s == pytest.approx(2000 / 8.0)  # the first step is left out
    assert first.tokens_per_s_per_gpu == pytest.approx(250 / 4)
    assert first.mfu == pytest.approx((0.2 * 2 + 0.4 * 6) / 8)
    assert (second.state, second.layout, second.seq_len) == ("running", "sp 4", 32768)


def test_recovered_share(tmp_path):
    rows = bits_rows(read_run(write_run(tmp_path)))
    assert [row.name for row in rows] == ["teacher", "start", "ctx_8k"]
    assert rows[2].recovered == {"wiki": pytest.approx(0.5), "plays": pytest.approx(0.25)}
    assert rows[2].recovered_mean == pytest.approx((3.5 - 2.75) / (3.5 - 1.5))
    assert rows[0].recovered_mean == 1.0
    assert rows[1].recovered_mean == 0.0


def test_points_of_other_evaluation_settings_are_left_out_and_counted(tmp_path):
    folder = write_run(tmp_path)
    points = json.loads((folder / "evaluation.json").read_text())["points"]
    points[0]["settings"], points[1]["settings"], points[2]["settings"] = {"wiki": 1}, {"wiki": 2}, {"wiki": 2}
    (folder / "evaluation.json").write_text(json.dumps({"points": points}))
    run = read_run(folder)
    assert [row.name for row in bits_rows(run)] == ["teacher", "ctx_8k"]
    assert run.notes == ("1 points of evaluation.json, of other evaluation settings, are left out.",)


def test_layout_text():
    assert layout_text({"tp": 1, "pp": 1, "sp": 1, "ep": 1}, 1) == "1 rank"
    assert layout_text({"sp": 8}, 256) == "dp 32 · sp 8"
    assert layout_text({"tp": 2}, None) == "dp ? · tp 2"
    assert layout_text(None, 4) == "?"


def test_the_page_is_one_file_with_its_plots(tmp_path):
    page = write_report(write_run(tmp_path))
    assert page == tmp_path / "report" / "index.html"
    assert {path.name for path in page.parent.iterdir()} == PLOTS | {"index.html"}
    parsed = Page(page.read_text(encoding="utf-8"))
    assert parsed.tags.count("img") == len(PLOTS)
    assert parsed.tags.count("table") == 2
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    text = " ".join(parsed.words)
    for expected in ("demo", "LS x 14", "ctx_32k", "2.750", "38%", "1 of 2"):
        assert expected in text
    for name in PLOTS:
        data = (page.parent / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 1000
        assert height > 400


def test_console_table(tmp_path):
    lines = summary_table(write_run(tmp_path)).splitlines()
    assert lines[0].split()[:4] == ["stage", "context", "layout", "steps"]
    assert "ctx_8k" in lines[2]
    assert lines[-1].split() == ["ctx_8k", "3k", "2.000", "3.500", "2.750", "38%"]
    blocks = [block.splitlines() for block in summary_table(tmp_path).split("\n\n")]
    assert all(len({len(line) for line in block}) == 1 for block in blocks)


@pytest.mark.parametrize("missing", ["recipe.yaml", "ledger.json", "metrics.jsonl", "evaluation.json"])
def test_a_missing_part_is_said_and_not_fatal(tmp_path, missing):
    write_run(tmp_path)
    for damaged in ("", "{[ garbage", "[3]"):
        (tmp_path / missing).write_text(damaged)
        assert missing in summary_table(tmp_path)
    (tmp_path / missing).unlink()
    text = " ".join(Page(write_report(tmp_path).read_text(encoding="utf-8")).words)
    assert f"{missing} is missing" in text


def test_an_empty_run_directory_gives_a_page(tmp_path):
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "metrics.jsonl is missing: there are no training curves." in page
    assert "<img" not in page


def test_a_run_directory_that_does_not_exist_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such run directory; give the run_dir"):
        write_report(tmp_path / "nowhere")


def test_nulls_and_single_steps_are_drawn(tmp_path):
    write_run(tmp_path)
    lines = [record(1, "ctx_8k", 5.0, first_step=True, mfu=None), record(2, "ctx_8k", 5.0, loss=None, mfu=None)]
    torn = '{"step": 3, "tok'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    assert len(read_run(tmp_path).records) == 2
    write_report(tmp_path)
    assert stage_rows(read_run(tmp_path))[0].mfu is None


def test_names_are_escaped(tmp_path):
    hostile = r"<script>alert('$\frac{')</script>$"
    page = write_report(write_run(tmp_path, stages=(hostile, "ctx_32k"))).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def write_expert_run(folder):
    write_run(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        load = {"5": [0.5, 1.5, 1.0, 1.0], "11": [0.0, 2.5, 1.0, 0.5]}
        line["experts"] = {"load_min": 0.0, "load_max": 2.5, "entropy": 0.9, "dropped": 3, "load": load}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    upcycling = {
        "tokens": 100, "alpha": 0.98, "relative_errors": {"11": 0.011, "5": 0.007}, "routing_weight": 0.0641,
        "expected_routing_weight": 0.0625, "loss": 2.5, "loss_dense": 2.4,
    }  # fmt: skip
    start = {"calibration": {"tokens": 100, "merge_norms": {"0": 0.11, "5": 0.4}}, "upcycling": upcycling}
    (folder / "start.json").write_text(json.dumps(start))
    return folder


def test_experts_have_plots_and_a_table(tmp_path):
    page = write_report(write_expert_run(tmp_path))
    assert PLOTS | {"expert_load.png", "expert_map.png"} == {path.name for path in page.parent.glob("*.png")}
    words = " ".join(Page(page.read_text()).words)
    for text in (
        "0.11 to 0.4",
        "0.90%, at most 1.10% (layer 11)",
        "2.5000 and 2.4000",
        "0.0641 and 0.0625",
        "dropped 15",
    ):
        assert text in words, text


def test_a_dense_run_says_nothing_of_experts(tmp_path):
    page = write_report(write_run(tmp_path))
    assert {path.name for path in page.parent.glob("*.png")} == PLOTS and "xpert" not in page.read_text()


def test_runs_that_spike_have_plots_of_it(tmp_path):
    write_run(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({**one, "spike_sparsity": 0.6, "spike_share": 0.5}) + "\n" for one in records]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    page = write_report(tmp_path)
    assert PLOTS | {"spike_sparsity.png", "spike_share.png"} == {path.name for path in page.parent.glob("*.png")}
    assert 'alt="spike sparsity"' in page.read_text()


def test_a_damaged_start_is_a_note(tmp_path):
    (write_expert_run(tmp_path) / "start.json").write_text("{")
    run = read_run(tmp_path)
    assert run.start == {} and any(note.startswith("start.json cannot be read") for note in run.notes)
