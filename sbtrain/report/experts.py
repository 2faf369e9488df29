"""What a run says of its mixtures of experts: how evenly tokens were spread, and how the experts began."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sbtrain.metrics.sinks import short
from sbtrain.report.run_files import RunFiles

INK, GRAY, HIGH, LOW = "#1f2933", "#7b8794", "#1f6feb", "#a9c8f7"
LOAD_TITLE = "Load of the busiest and the idlest expert over the even share"
MAP_TITLE = "Load of every expert over the even share, last tenth of the steps"


@dataclass(frozen=True)
class Upcycled:
    """One layer's row of the table: the relative error of its upcycled FFN when training began."""

    layer: int
    error: float


def expert_records(run: RunFiles) -> list[dict]:
    """The steps that say how experts were loaded."""
    return [record for record in run.records if isinstance(record.get("experts"), dict) and record["experts"]["load"]]


def num_dropped(run: RunFiles) -> int:
    """Choices of experts that were not carried out, over all steps and layers."""
    return sum(int(record["experts"].get("dropped") or 0) for record in expert_records(run))


def load_figure(figure: Figure, axes, run: RunFiles) -> Figure:
    """The largest and the smallest load over tokens, and the even share."""
    records = expert_records(run)
    tokens = [record["tokens"] for record in records]
    for key, color, label in (("load_max", HIGH, "busiest"), ("load_min", LOW, "idlest")):
        values = [record["experts"][key] for record in records]
        axes.plot(tokens, values, color=color, linewidth=1.8, label=label, marker="o" if len(tokens) < 3 else None)
    axes.axhline(1.0, color=GRAY, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(record["tokens"] for record in run.records))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("tokens", color=GRAY)
    axes.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def map_figure(figure: Figure, axes, run: RunFiles) -> Figure:
    """Layers by experts, each cell as dark as its load."""
    records = expert_records(run)
    last = [record["experts"]["load"] for record in records[-max(1, len(records) // 10) :]]
    layers = sorted(last[-1], key=int)
    loads = numpy.array([[load[layer] for layer in layers] for load in last]).mean(0)
    image = axes.imshow(loads, cmap="Blues", vmin=0, vmax=max(2.0, float(loads.max())), aspect="auto")
    axes.grid(False)
    axes.set_yticks(range(len(layers)), layers)
    axes.xaxis.set_major_locator(MaxNLocator(min(16, loads.shape[1]), integer=True))
    axes.set_xlabel("expert", color=GRAY)
    axes.set_ylabel("layer", color=GRAY)
    if loads.size <= 400:
        for (row, column), load in numpy.ndenumerate(loads):
            color = "white" if load > 0.6 * image.norm.vmax else INK
            axes.annotate(f"{load:.1f}", (column, row), ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes)
    return figure


def start_facts(run: RunFiles) -> list[tuple[str, str]]:
    """What start.json says, as (name, value): calibration of the pairs, check of the upcycled experts."""
    facts, upcycling = [], run.start.get("upcycling") or {}
    norms = list(((run.start.get("calibration") or {}).get("merge_norms") or {}).values())
    if norms:
        facts.append(("Branch norms of the pairs at the start", f"{min(norms):.3g} to {max(norms):.3g}"))
    rows = upcycled_rows(run)
    if rows:
        worst = max(rows, key=lambda row: row.error)
        mean = sum(row.error for row in rows) / len(rows)
        facts += [
            (
                "Upcycled FFNs against dense ones, relative error",
                f"{mean:.2%}, at most {worst.error:.2%} (layer {worst.layer})",
            ),
            ("Loss at the start, experts and dense", f"{upcycling['loss']:.4f} and {upcycling['loss_dense']:.4f}"),
            (
                "Sum of a token's routing weights, and what was expected",
                f"{upcycling['routing_weight']:.4f} and {upcycling['expected_routing_weight']:.4f}",
            ),
        ]
    if expert_records(run):
        facts.append(("Choices of experts that were dropped", f"{num_dropped(run):,}"))
    return facts


def upcycled_rows(run: RunFiles) -> list[Upcycled]:
    """The check of the upcycled experts by layer, in order."""
    errors = (run.start.get("upcycling") or {}).get("relative_errors") or {}
    return [Upcycled(int(layer), errors[layer]) for layer in sorted(errors, key=int)]
