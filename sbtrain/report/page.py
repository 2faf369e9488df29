"""report/index.html: one page without external assets, readable on a phone, with everything escaped."""

from __future__ import annotations

import base64
import os
from html import escape
from pathlib import Path

from sbtrain.inference.spiking_tables import layer_cells, projection_cells, sweep_cells
from sbtrain.metrics.sinks import duration, short
from sbtrain.report.experts import start_facts
from sbtrain.report.plots import write_plots
from sbtrain.report.run_files import RunFiles, read_run
from sbtrain.report.tables import bits_rows, number, percent, source_names, stage_cells, stage_rows

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --gray: #616e7c; --line: #e4e7eb; --accent: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.75rem; }
p { margin: 0.5rem 0; } .quiet { color: var(--gray); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.75rem; margin: 1.5rem 0 0; }
.facts div { border: 1px solid var(--line); border-radius: 10px; padding: 0.7rem 0.9rem; }
.facts dt { color: var(--gray); font-size: 0.8rem; } .facts dd { margin: 0; font-size: 1.35rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.45rem 0.65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--gray); font-weight: 500; font-size: 0.8rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td small { color: var(--gray); margin-left: 0.35rem; }
tr.last td { font-weight: 600; }
img { display: block; width: 100%; min-width: 34rem; height: auto; margin: 1.25rem 0 0.5rem; }
.notes { border-left: 3px solid #f0b429; padding: 0.25rem 0 0.25rem 1rem; margin: 1.5rem 0 0; list-style: none; }
"""


SPIKING_PLOTS = ["spiking_windows", "spiking_counts", "spiking_cost", "spiking_raster"]
ABOUT_SPIKES = (
    "Silent windows: 3-step windows without a spike, the sparsity of the SpikingBrain report. Spikes: of a value, as "
    "the bits of its count with their sign. Energy (pJ, and the share saved against a multiply-accumulate in FP16 or "
    "INT8): ideal, additions alone, at 45 nm. Cost: rise of the mean over the same weights without spikes."
)


def write_report(run_dir: str | Path) -> Path:
    """Build RUN_DIR/report/index.html and its PNG plots from what the run has written so far; the page's path.

    Raises ValueError when run_dir does not exist; anything missing inside it is said on the page.
    """
    run = read_run(run_dir)
    folder = run.folder / "report"
    folder.mkdir(exist_ok=True)
    plots = write_plots(run, folder)
    page = folder / "index.html"
    staged = folder / "index.html.tmp"
    staged.write_text(html_page(run, plots), encoding="utf-8")
    os.replace(staged, page)
    return page


def html_page(run: RunFiles, plots: dict[str, Path]) -> str:
    """The whole page."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(run.name)} · sbtrain</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(run.name)}</h1>",
            f'<p class="quiet">{escape(subtitle(run))}</p>',
            facts(run),
            notes(run),
            *section("Bits per byte", bits_table(run), plots, ["bits_per_byte"]),
            *section("Stages", stage_table(run), plots, ["loss"]),
            *section("Experts and pairs", start_table(run), plots, ["expert_load", "expert_map"]),
            *section("Spikes", spiking_tables(run), plots, SPIKING_PLOTS),
            *section("Training", "", plots, ["lr", "tokens_per_s", "grad_norm", "spike_sparsity", "spike_share"]),
            "</body></html>",
        ]
    )


def subtitle(run: RunFiles) -> str:
    """Model, start and precision in one line, as far as the recipe is known."""
    model, start = run.recipe.get("model") or {}, run.recipe.get("start") or {}
    parts = [f"layers {model['pattern']}" if model.get("pattern") else ""]
    parts.append(f"from {Path(start['path']).name}" if start.get("path") else "")
    parts.append(str(run.recipe.get("precision") or ""))
    return " · ".join(part for part in parts if part)


def facts(run: RunFiles) -> str:
    """The headline numbers: what was recovered, tokens, time."""
    found = []
    trained = [row for row in bits_rows(run) if row.name not in ("teacher", "start")]
    if trained:
        found.append(("Distance to the teacher recovered", percent(trained[-1].recovered_mean)))
        found.append(("Bits per byte, mean", number(trained[-1].mean)))
    rows = stage_rows(run)
    if run.records:
        found.append(("Tokens", short(sum(row.tokens for row in rows))))
        found.append(("Time in steps", duration(sum(row.time_s for row in rows))))
    done = sum(row.state == "done" for row in rows)
    if rows:
        found.append(("Stages done", f"{done} of {len(rows)}"))
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in found)
    return f'<dl class="facts">{cards}</dl>' if cards else ""


def notes(run: RunFiles) -> str:
    """What is missing, said plainly."""
    lines = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return f'<ul class="notes">{lines}</ul>' if lines else ""


def section(title: str, table: str, plots: dict[str, Path], wanted: list[str]) -> list[str]:
    """A heading with its table and plots; nothing when there is neither."""
    images = [image(plots[name], name) for name in wanted if name in plots]
    return [f"<h2>{escape(title)}</h2>", table, *images] if table or images else []


def image(path: Path, name: str) -> str:
    """A plot inside the page itself, so that the page can be sent alone."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="scroll"><img alt="{escape(name.replace("_", " "))}" src="data:image/png;base64,{data}"></div>'


def bits_table(run: RunFiles) -> str:
    """Bits per byte by model and source; beside each stage's number the share it has recovered."""
    if not run.points:
        return ""
    sources, rows = source_names(run), bits_rows(run)
    header = ["model", "tokens", *sources, "mean"]
    body = []
    for row in rows:
        anchor = row.name in ("teacher", "start")
        tokens = "-" if row.tokens is None or row.name == "teacher" else short(row.tokens)
        cells = [escape(row.name), escape(tokens)]
        cells += [bits_cell(row.bits[source], None if anchor else row.recovered[source]) for source in sources]
        cells.append(bits_cell(row.mean, None if anchor else row.recovered_mean))
        body.append(cells)
    about = "The small number is the recovered share of the distance, (start − x) / (start − teacher)."
    return html_table(header, body, last=rows[-1].name not in ("teacher", "start")) + f'<p class="quiet">{about}</p>'


def bits_cell(value: float | None, recovered: float | None) -> str:
    """One number, with its recovered share when there is one."""
    return number(value) + ("" if recovered is None else f"<small>{percent(recovered)}</small>")


def stage_table(run: RunFiles) -> str:
    """The stages as a table."""
    header, cells = stage_cells(run)
    return html_table(header, [[escape(cell) for cell in row] for row in cells]) if cells else ""


def start_table(run: RunFiles) -> str:
    """What was measured when the first weights were set, and the tokens that experts dropped."""
    facts = start_facts(run)
    return html_table(["measured", "value"], [[escape(name), escape(value)] for name, value in facts]) if facts else ""


def spiking_tables(run: RunFiles) -> str:
    """Cost and sparsity by k, then all figures of one k by projection and by layer."""
    if not run.spiking:
        return ""
    tables = ""
    for header, rows in (sweep_cells(run.spiking), projection_cells(run.spiking), layer_cells(run.spiking)):
        tables += html_table(header, [[escape(cell) for cell in row] for row in rows])
    about = f"{ABOUT_SPIKES} Measured on {Path(run.spiking['model']).name}."
    return tables + f'<p class="quiet">{escape(about)}</p>'


def html_table(header: list[str], rows: list[list[str]], last: bool = False) -> str:
    """A table that scrolls sideways on a narrow screen. Cells are HTML already; `last` stresses the last row."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ""
    for index, row in enumerate(rows):
        mark = ' class="last"' if last and index == len(rows) - 1 else ""
        body += f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
