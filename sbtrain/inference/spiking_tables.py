"""Tables of suite spiking, from the dictionary that it writes: cells for reports, aligned text for the terminal."""

from __future__ import annotations

Cells = tuple[list[str], list[list[str]]]

_SHARES = {
    "silent windows": "silent_windows",
    "zero counts": "zero_counts",
    "zero bits": "zero_bits",
    "counts ≤ 7": "at_most_7",
    "silent channels": "silent_channels",
}


def table(report: dict) -> str:
    """Bits per byte and sparsity by k, then the figures of one k by projection and by layer."""
    parts = (sweep_cells(report), projection_cells(report), layer_cells(report))
    return "\n\n".join("\n".join(_aligned(*cells)) for cells in parts)


def detail(report: dict) -> dict:
    """The point of the sweep that details are shown of."""
    return report["sweep"][report["shown"]]


def name_of(point: dict) -> str:
    """What a point of the sweep is called."""
    return "k by layer" if point["layer_k"] else f"k = {point['k']:g}"


def sweep_cells(report: dict) -> Cells:
    """Bits per byte of every text, their mean, its rise over that without spikes, and sparsity, by k."""
    names = [f"{result['source']} {result['length']}" for result in report["off"]["results"]]
    rows = [["no spikes", *_bits(report["off"]), *[""] * 5]]
    for point in report["sweep"]:
        rows.append([name_of(point), *_bits(point), f"{point['cost']:+.2%}", *_essence(point["total"])])
    header = ["bits per byte", *names, "mean", "cost", "silent windows", "spikes", "saved, FP16", "saved, INT8"]
    return header, rows


def projection_cells(report: dict) -> Cells:
    """All figures of one k, by projection and together."""
    point = detail(report)
    return _figures(name_of(point), {**point["projections"], "all": point["total"]})


def layer_cells(report: dict) -> Cells:
    """All figures of one k, by layer."""
    return _figures("layer", detail(report)["layers"])


def _figures(title: str, groups: dict[str, dict]) -> Cells:
    header = [title, *_SHARES, "spikes", "pJ", "saved, FP16", "saved, INT8"]
    rows = []
    for name, figures in groups.items():
        shares = [f"{figures[key]:.2%}" for key in _SHARES.values()]
        _, *energy = _essence(figures)
        rows.append([name, *shares, energy[0], f"{figures['energy']['pj']:.4f}", *energy[1:]])
    return header, rows


def _essence(figures: dict) -> list[str]:
    """Silent windows, spikes of a value, energy saved against FP16 and INT8 MACs."""
    energy = figures["energy"]
    return [
        f"{figures['silent_windows']:.2%}",
        f"{figures['mean_spikes']:.3f}",
        f"{energy['saved_fp16']:.1%}",
        f"{energy['saved_int8']:.1%}",
    ]


def _bits(point: dict) -> list[str]:
    return [f"{value:.4f}" for value in (*(result["bits_per_byte"] for result in point["results"]), point["mean"])]


def _aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    first, *rest = widths
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(size) for cell, size in zip(row[1:], rest))]).rstrip()
        for row in (header, *rows)
    ]
