"""The plots of a run as PNG files: loss, learning rate, speed and gradient norm over tokens, bits per byte as bars."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sbtrain.inference.spiking_plots import write_spiking_plots
from sbtrain.metrics.figure import GRAY, INK, LINE, PALE, blank, literal, save
from sbtrain.metrics.sinks import short
from sbtrain.report.experts import LOAD_TITLE, MAP_TITLE, expert_records, load_figure, map_figure
from sbtrain.report.run_files import RunFiles
from sbtrain.report.tables import bits_rows, source_names

TEACHER, START = "#3e4c59", "#cbd2d9"
STAGES = ("#b6d4fe", "#6ea8fe", "#1f6feb", "#0b3d91", "#062a66")

CURVES = (
    ("loss", "loss", "Training loss (nats per token)", "linear"),
    ("lr", "lr", "Learning rate", "linear"),
    ("tokens_per_s", "tokens_per_s_per_gpu", "Tokens per second per GPU", "linear"),
    ("grad_norm", "grad_norm", "Gradient norm before clipping", "log"),
    ("spike_sparsity", "spike_sparsity", "Windows of three steps without a spike", "linear"),
    ("spike_share", "spike_share", "Share of activations replaced by spikes", "linear"),
)


def write_plots(run: RunFiles, folder: Path) -> dict[str, Path]:
    """Write every plot that the run has numbers for; name -> PNG path."""
    plots = {}
    for name, key, title, scale in CURVES:
        series = [(record["tokens"], record.get(key)) for record in run.records]
        if any(value is not None for _, value in series):
            plots[name] = save(curve(run, key, title, scale), folder / f"{name}.png")
    if expert_records(run):
        plots["expert_load"] = save(load_figure(*blank(LOAD_TITLE), run), folder / "expert_load.png")
        plots["expert_map"] = save(map_figure(*blank(MAP_TITLE), run), folder / "expert_map.png")
    if run.spiking:
        plots |= write_spiking_plots(run.spiking, folder)
    if run.points:
        plots["bits_per_byte"] = save(bits_figure(run), folder / "bits_per_byte.png")
    return plots


def curve(run: RunFiles, key: str, title: str, scale: str) -> Figure:
    """One number of the records over tokens, with the stages marked; a running mean where the number is noisy."""
    records = [record for record in run.records if record.get(key) is not None]
    if key == "tokens_per_s_per_gpu":  # the first step also pays for start-up
        records = [record for record in records if "first_step" not in record] or records
    figure, axes = blank(title)
    for _, stage in groupby(records, key=lambda record: record["stage"]):  # a line never runs across a boundary
        draw(axes, [(record["tokens"], record[key]) for record in stage], smoothed=key in ("loss", "grad_norm"))
    values = [record[key] for record in records]
    if scale == "log" and min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
    elif key != "loss":
        axes.set_ylim(0, 1.05 * max(values) or 1)  # a flat line would lie on the upper edge
    if key == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_xlim(0, max(record["tokens"] for record in run.records))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.set_xlabel("tokens", color=GRAY)
    mark_stages(axes, run)
    return figure


def draw(axes, series: list[tuple[int, float]], *, smoothed: bool) -> None:
    """One stretch of a curve; a noisy one is pale, with its running mean on top."""
    tokens, values = [place for place, _ in series], [value for _, value in series]
    reach = max(len(values) // 40, 1) if smoothed and len(values) >= 8 else 0
    if reach:
        axes.plot(tokens, values, color=PALE, linewidth=1)
    marker = "o" if len(values) < 3 else None
    axes.plot(tokens, running_mean(values, reach), color=LINE, linewidth=1.8, marker=marker, markersize=4)


def mark_stages(axes, run: RunFiles) -> None:
    """Shade every second stage, draw its boundary and write its name above the plot."""
    for index, (name, begin, end) in enumerate(stage_spans(run)):
        if index % 2:
            axes.axvspan(begin, end, color=INK, alpha=0.035, linewidth=0)
        if index:
            axes.axvline(begin, color=GRAY, linewidth=0.8, linestyle=(0, (4, 3)))
        if end - begin > 0.07 * axes.get_xlim()[1]:  # else the names would run into each other
            middle = (begin + end) / 2
            place = {"transform": axes.get_xaxis_transform(), "ha": "center"}
            axes.text(middle, 1.02, literal(name), color=GRAY, fontsize=9, **place)


def stage_spans(run: RunFiles) -> Iterator[tuple[str, int, int]]:
    """(stage, first token, last token) of each stretch of steps in one stage."""
    begin = 0
    for name, records in groupby(run.records, key=lambda record: record["stage"]):
        end = list(records)[-1]["tokens"]
        yield name, begin, end
        begin = end


def bits_figure(run: RunFiles) -> Figure:
    """Bits per byte as grouped bars: a group for each source, a bar for each model."""
    rows, sources = bits_rows(run), source_names(run)
    groups = [*sources, "mean"] if len(sources) > 1 else sources
    figure, axes = blank("Bits per byte on held-out text (lower is better)", height=3.8)
    width = 0.82 / max(1, len(rows))
    stage_rows = [row.name for row in rows if row.name not in ("teacher", "start")]
    for index, row in enumerate(rows):
        values = [row.mean if group == "mean" and group not in row.bits else row.bits[group] for group in groups]
        places = [group + (index - (len(rows) - 1) / 2) * width for group in range(len(groups))]
        heights = [value or 0.0 for value in values]
        axes.bar(places, heights, 0.92 * width, color=bar_color(row.name, stage_rows), label=literal(row.name))
        for place, value in zip(places, values):
            text = "n/a" if value is None else f"{value:.2f}"
            crowded = len(rows) * len(groups) > 16
            axes.annotate(text, (place, value or 0.0), xytext=(0, 3), textcoords="offset points", ha="center",
                          fontsize=6.5 if crowded else 8, color=INK)  # fmt: skip
    axes.set_xticks(range(len(groups)), map(literal, groups))
    axes.tick_params(axis="x", length=0, labelsize=10)
    axes.margins(x=0.02, y=0.12)
    figure.legend(loc="outside lower center", ncols=min(6, len(rows)), frameon=False, fontsize=9)
    return figure


def bar_color(name: str, stages: list[str]) -> str:
    """Gray for the two anchors, a blue that darkens with every stage."""
    if name in ("teacher", "start"):
        return TEACHER if name == "teacher" else START
    position = stages.index(name) / max(1, len(stages) - 1)
    return STAGES[round(position * (len(STAGES) - 1))] if len(stages) > 1 else LINE


def running_mean(values: list[float], reach: int) -> list[float]:
    """Mean over up to `reach` neighbors on either side."""
    total = numpy.concatenate([[0.0], numpy.cumsum(values)])
    places = numpy.arange(len(values))
    low, high = numpy.maximum(places - reach, 0), numpy.minimum(places + reach + 1, len(values))
    return list((total[high] - total[low]) / (high - low))
