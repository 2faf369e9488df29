"""The rows of `bench.py ops` as a chart: a panel for each op and pass, bars of speed relative to our own version."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sbtrain.bench.ops_case import PASSES

OURS, REFERENCE, INK, GRAY = "#1f6feb", "#cbd2d9", "#1f2933", "#7b8794"
PEERS = ("#e8853d", "#3a9d6e", "#8a5cc2", "#b8475a", "#8d7b3f", "#4aa3b5")
PASS_TITLES = {"forward": "forward", "both": "forward + backward"}
PANEL_INCHES, BAR_INCHES, TITLE_INCHES, LEGEND_INCHES = 6.4, 0.17, 0.95, 0.5
GAP = 0.7


def write_chart(rows: list[dict], path: Path) -> None:
    """Write the PNG; nothing without a measured row."""
    measured = [row for row in rows if "problem" not in row and row["speed_against_ours"]]
    if not measured:
        return
    ops = list(dict.fromkeys(row["op"] for row in measured))
    passes = [which for which in PASSES if any(row["pass"] == which for row in measured)]
    panels = {(op, which): _groups(measured, op, which) for op in ops for which in passes}
    colors = _colors(measured)
    heights = [max(_num_bars(panels[op, which]) for which in passes) * BAR_INCHES + TITLE_INCHES for op in ops]
    size = (PANEL_INCHES * len(passes), LEGEND_INCHES + sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(ops), len(passes), squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, op in zip(grid, ops):
        for axes, which in zip(line, passes):
            _panel(axes, panels[op, which], colors, title=f"{op}, {PASS_TITLES[which]}")
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4 * len(passes)), frameon=False)
    figure.savefig(path, dpi=100)


def _groups(rows: list[dict], op: str, which: str) -> dict[str, list[dict]]:
    """Case and length -> its rows."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["op"] == op and row["pass"] == which:
            found.setdefault(_label(row["case"], row["num_tokens"]), []).append(row)
    return found


def _num_bars(groups: dict[str, list[dict]]) -> float:
    return sum(len(rows) + _gap(rows) for rows in groups.values())


def _gap(rows: list[dict]) -> float:
    """Below a group, in bars: the two lines of its label need the height of two."""
    return GAP + max(0, 2 - len(rows))


def _panel(axes: Axes, groups: dict[str, list[dict]], colors: dict[str, str], *, title: str) -> None:
    """Length of a bar: speed of a version over ours. At its end: its milliseconds."""
    if not groups:
        axes.set_axis_off()
        return
    place, ticks = 0.0, []
    for rows in groups.values():
        for row in rows:
            length = row["speed_against_ours"]
            axes.barh(place, length, 0.9, color=colors[row["version"]])
            text = f"{_milliseconds(row['ms']['median'])} ms"
            axes.annotate(text, (length, place), (3, 0), textcoords="offset points", va="center", fontsize=7, color=INK)
            place += 1
        ticks.append(place - (len(rows) + 1) / 2)
        place += _gap(rows)
    axes.axvline(1.0, color=GRAY, linewidth=0.8, linestyle=":")
    axes.set_yticks(ticks, list(groups), fontsize=8)
    axes.set_ylim(place - GAP - 0.3, -0.7)
    axes.set_xlim(0, 1.18 * max(row["speed_against_ours"] for rows in groups.values() for row in rows))
    axes.set_xlabel("speed relative to ours", color=GRAY, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.tick_params(axis="x", colors=GRAY, labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(case: str, num_tokens: int) -> str:
    length = f"{num_tokens // 1024}k" if num_tokens % 1024 == 0 else f"{num_tokens}"
    return "\n".join(part for part in (case, f"{length} tokens") if part)


def _milliseconds(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _colors(rows: list[dict]) -> dict[str, str]:
    """Our versions first: blue, the reference gray; peers in a fixed order of colors."""
    ours = {row["version"] for row in rows if row["ours"]}
    versions = dict.fromkeys(row["version"] for row in rows)
    order = sorted(versions, key=lambda name: (name not in ours, name == "reference"))
    peers = iter(PEERS * len(order))
    return {name: (REFERENCE if name == "reference" else OURS) if name in ours else next(peers) for name in order}
