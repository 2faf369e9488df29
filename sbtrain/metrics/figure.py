"""The style of every plot: colors, an empty figure, and its PNG."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, GRAY, LINE, PALE = "#1f2933", "#7b8794", "#1f6feb", "#a9c8f7"


def literal(name: str) -> str:
    """A name as matplotlib shows it letter by letter: a dollar sign does not begin a formula."""
    return name.replace("$", r"\$")


def blank(title: str, height: float = 3.2):
    """A figure with one empty set of axes in the report's style."""
    figure = Figure(figsize=(8, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=20)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.tick_params(colors=GRAY, labelsize=9)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG."""
    figure.savefig(path, facecolor="white")
    return path
