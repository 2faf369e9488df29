"""Plots of suite spiking, from the dictionary that it writes: windows, counts, rasters, and what sparsity costs."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import ops
from sbtrain.inference.spiking_tables import detail, name_of
from sbtrain.metrics.figure import GRAY, INK, LINE, PALE, blank, save
from sbtrain.spiking.statistics import SHOWN_COUNTS

REPORT_WINDOWS = (0.6915, 0.1930, 0.0969, 0.0185)
"""Windows with 0, 1, 2 and more spikes of SpikingBrain-7B: report, Figure 9."""

_NEGATIVE = "#d64545"


def write_spiking_plots(report: dict, folder: Path) -> dict[str, Path]:
    """Write the PNG files of a report of the suite; name -> path."""
    detailed = detail(report)
    figures = {
        "spiking_windows": windows_figure(detailed),
        "spiking_counts": counts_figure(detailed),
        "spiking_raster": raster_figure(report["rasters"]) if report["rasters"] else None,
        "spiking_cost": cost_figure(report),
    }
    return {name: save(figure, folder / f"{name}.png") for name, figure in figures.items() if figure is not None}


def windows_figure(point: dict) -> Figure:
    """Shares of 3-step windows by the spikes in them, beside the report's Figure 9."""
    figure, axes = blank(f"Spikes in windows of three steps, {name_of(point)}")
    groups = (("this model", point["total"]["window_spikes"], LINE), ("SpikingBrain-7B", REPORT_WINDOWS, "#cbd2d9"))
    for index, (label, shares, color) in enumerate(groups):
        places = numpy.arange(len(shares)) + (index - 0.5) * 0.4
        bars = axes.bar(places, shares, 0.37, color=color, label=label)
        axes.bar_label(bars, [f"{share:.2%}" for share in shares], fontsize=8, padding=2, color=INK)
    axes.set_xticks(range(4), ["0", "1", "2", "≥ 3"])
    axes.set_xlabel("spikes in a window", color=GRAY)
    _in_percent(axes)
    axes.legend(frameon=False, fontsize=9)
    return figure


def counts_figure(point: dict) -> Figure:
    """Shares of the counts |s|."""
    figure, axes = blank(f"Spike counts, {name_of(point)}")
    shares = point["total"]["counts"]
    bars = axes.bar(range(len(shares)), shares, 0.8, color=[LINE] * 8 + [PALE] * (len(shares) - 8))
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], fontsize=7, padding=2, color=INK)
    axes.set_xticks(range(len(shares)), [*map(str, range(SHOWN_COUNTS)), f"≥ {SHOWN_COUNTS}"])
    axes.set_xlabel(f"|s|; {point['total']['at_most_7']:.1%} are at most 7, which one window holds", color=GRAY)
    _in_percent(axes)
    return figure


def raster_figure(rasters: list[dict]) -> Figure:
    """Spikes of some channels over the steps of consecutive tokens: blue fires +1, red -1, as in Figure 10."""
    heading = "Spikes over time: the bits of each token's counts, with their sign"
    figure, first = blank(heading, 2.4 * len(rasters) + 0.6)
    place = first.get_subplotspec()
    first.remove()
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    colors = ListedColormap([_NEGATIVE, "white", LINE])
    for raster, cell in zip(rasters, place.subgridspec(len(rasters), 1), strict=True):
        spikes = ops.spike_encode(torch.tensor(raster["counts"]), encoding="bidirectional")
        num_steps, num_tokens, num_channels = spikes.shape
        axes = figure.add_subplot(cell)
        axes.imshow(
            spikes.permute(2, 1, 0).reshape(num_channels, -1).numpy(),
            cmap=colors, vmin=-1, vmax=1, aspect="auto", interpolation="nearest",
        )  # fmt: skip
        for token in range(1, num_tokens):
            axes.axvline(token * num_steps - 0.5, color="#e4e7eb", linewidth=0.5)
        axes.set_xticks([(token + 0.5) * num_steps - 0.5 for token in range(num_tokens)], range(num_tokens))
        axes.set_title(f"layer {raster['layer']}, {raster['site']}: {num_steps} steps a token", fontsize=9, color=GRAY)
        axes.set_ylabel("channel", color=GRAY, fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(colors=GRAY, labelsize=8)
        axes.spines[:].set_color("#cbd2d9")
    axes.set_xlabel("token", color=GRAY)
    return figure


def cost_figure(report: dict) -> Figure:
    """Bits per byte over sparsity, a dot for each k, and the level without spikes; the report's Table 11 as a curve."""
    figure, axes = blank("What sparsity costs")
    points = sorted(report["sweep"], key=lambda point: point["total"]["silent_windows"])
    places = [point["total"]["silent_windows"] for point in points]
    bits = [point["mean"] for point in points]
    axes.plot(places, bits, color=LINE, linewidth=1.8, marker="o", markersize=5, label="with spikes")
    for point, place, value in zip(points, places, bits):
        axes.annotate(name_of(point), (place, value), xytext=(0, 7), textcoords="offset points", ha="center",
                      fontsize=8, color=INK)  # fmt: skip
    axes.axhline(report["off"]["mean"], color=GRAY, linewidth=1, linestyle=(0, (4, 3)), label="without")
    axes.set_xlabel("silent windows (the report's sparsity)", color=GRAY)
    axes.set_ylabel("bits per byte, mean", color=GRAY)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.margins(x=0.1, y=0.2)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _in_percent(axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.margins(y=0.12)
