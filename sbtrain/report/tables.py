"""The two tables of a run: its stages, and bits per byte of teacher, converted start and every stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sbtrain.metrics.sinks import duration, short
from sbtrain.report.run_files import RunFiles, read_run


@dataclass(frozen=True)
class StageRow:
    """One stage as it went. Speeds leave out the first step after each start; None: not known."""

    name: str
    state: str
    seq_len: int | None
    layout: str
    num_steps: int
    tokens: int
    planned_tokens: int | None
    time_s: float
    tokens_per_s: float | None
    tokens_per_s_per_gpu: float | None
    mfu: float | None
    loss: float | None


@dataclass(frozen=True)
class BitsRow:
    """One evaluated model: bits per byte by source, their mean, and the recovered share of the distance (0 to 1).

    The distance is from the converted start to the teacher: (start - x) / (start - teacher). None where undefined.
    """

    name: str
    tokens: int | None
    bits: dict[str, float | None]
    mean: float | None
    recovered: dict[str, float | None]
    recovered_mean: float | None


def stage_rows(run: RunFiles) -> list[StageRow]:
    """A row for every stage of the recipe, in order."""
    finished = set(run.ledger.get("stages_done") or [])
    rows = []
    for name, plan in run.stages.items():
        records = [record for record in run.records if record["stage"] == name]
        state = "done" if name in finished else "running" if records else "not started"
        rows.append(stage_row(name, plan, records, state))
    return rows


def stage_row(name: str, plan: dict, records: list[dict], state: str) -> StageRow:
    """Summarize the records of one stage."""
    time_s = sum(record.get("step_time_s") or 0.0 for record in records)
    steady = [record for record in records if "first_step" not in record and record.get("step_time_s")]
    steady_s = sum(record["step_time_s"] for record in steady)
    mfus = [record["mfu"] * record["step_time_s"] for record in steady if record.get("mfu") is not None]
    world_size = max((record.get("world_size") or 1 for record in records), default=None)
    steady_tokens = sum(step_tokens(record) for record in steady)
    losses = [record["loss"] for record in records[-max(1, len(records) // 10) :] if record.get("loss") is not None]
    return StageRow(
        name=name,
        state=state,
        seq_len=plan.get("seq_len"),
        layout=layout_text(plan.get("layout"), world_size),
        num_steps=len(records),
        tokens=round(sum(step_tokens(record) for record in records)),
        planned_tokens=plan.get("tokens"),
        time_s=time_s,
        tokens_per_s=steady_tokens / steady_s if steady_s else None,
        tokens_per_s_per_gpu=steady_tokens / steady_s / world_size if steady_s else None,
        mfu=sum(mfus) / steady_s if mfus else None,
        loss=sum(losses) / len(losses) if losses else None,
    )


def step_tokens(record: dict) -> float:
    """Tokens of one step over all ranks."""
    speed = record.get("tokens_per_s_per_gpu") or 0.0
    return speed * (record.get("step_time_s") or 0.0) * (record.get("world_size") or 1)


def layout_text(layout: dict | None, world_size: int | None) -> str:
    """A layout as `dp 64 · sp 4`: what is greater than one; dp needs the world size that the steps ran in."""
    if layout is None:
        return "?"
    ranks = {axis: int(layout.get(axis) or 1) for axis in ("tp", "pp", "ep", "sp")}
    dp = world_size // (ranks["tp"] * ranks["pp"] * ranks["sp"]) if world_size else None
    parts = ["dp ?"] if dp is None else [f"dp {dp}"] if dp > 1 else []
    parts += [f"{axis} {count}" for axis, count in ranks.items() if count > 1]
    return " · ".join(parts) or "1 rank"


def bits_rows(run: RunFiles) -> list[BitsRow]:
    """A row for every evaluated point, in the order they were measured, the teacher first."""
    by_name = {point.get("name"): point for point in run.points}
    teacher, start = by_name.get("teacher"), by_name.get("start")
    points = sorted(run.points, key=lambda point: (point is not teacher, point is not start))
    rows = []
    for point in points:
        bits = {source: bits_of(point, source) for source in source_names(run)}
        recovered = {
            source: share(bits_of(start, source), value, bits_of(teacher, source)) for source, value in bits.items()
        }
        mean, anchors = mean_of(point), (mean_of(start), mean_of(teacher))
        rows.append(
            BitsRow(
                name=str(point.get("name", "?")),
                tokens=point.get("tokens"),
                bits=bits,
                mean=mean,
                recovered=recovered,
                recovered_mean=share(anchors[0], mean, anchors[1]),
            )
        )
    return rows


def source_names(run: RunFiles) -> list[str]:
    """Every evaluated source, in order of first appearance."""
    return list(dict.fromkeys(source for point in run.points for source in point["sources"]))


def bits_of(point: dict | None, source: str) -> float | None:
    """Bits per byte of a point on a source, None where it was not measured."""
    return ((point or {}).get("sources", {}).get(source) or {}).get("bits_per_byte")


def mean_of(point: dict | None) -> float | None:
    """The mean that the evaluation wrote, None when the point is missing."""
    return (point or {}).get("mean")


def share(start: float | None, value: float | None, teacher: float | None) -> float | None:
    """(start - value) / (start - teacher): 0 at the converted start, 1 at the teacher."""
    if None in (start, value, teacher) or start == teacher:
        return None
    return (start - value) / (start - teacher)


def percent(value: float | None, digits: int = 0) -> str:
    """A share as text, `-` when unknown."""
    return "-" if value is None else f"{value:.{digits}%}"


def number(value: float | None, digits: int = 3) -> str:
    """A number as text, `-` when unknown."""
    return "-" if value is None else f"{value:.{digits}f}"


def stage_cells(run: RunFiles) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the stage table, as text."""
    header = ["stage", "context", "layout", "steps", "tokens", "time", "tok/s", "tok/s/GPU", "MFU", "loss", "state"]
    cells = []
    for row in stage_rows(run):
        planned = "" if row.planned_tokens is None else f"/{short(row.planned_tokens)}"
        cells.append(
            [
                row.name,
                "-" if row.seq_len is None else f"{row.seq_len:,}",
                row.layout,
                str(row.num_steps),
                short(row.tokens) + planned,
                duration(row.time_s),
                "-" if row.tokens_per_s is None else short(row.tokens_per_s),
                "-" if row.tokens_per_s_per_gpu is None else short(row.tokens_per_s_per_gpu),
                percent(row.mfu, 1),
                number(row.loss),
                row.state,
            ]
        )
    return header, cells


def bits_cells(run: RunFiles) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of bits per byte, as text."""
    sources = source_names(run)
    header = ["bits per byte", "tokens", *sources, "mean", "recovered"]
    cells = []
    for row in bits_rows(run):
        tokens = "-" if row.tokens is None or row.name == "teacher" else short(row.tokens)
        bits = [number(row.bits[source]) for source in sources]
        cells.append([row.name, tokens, *bits, number(row.mean), percent(row.recovered_mean)])
    return header, cells


def aligned(header: list[str], cells: list[list[str]]) -> list[str]:
    """A table as lines of text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    lines = []
    for row in [header, *cells]:
        first, rest = row[0].ljust(widths[0]), [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([first, *rest]))
    lines.insert(1, "─" * len(lines[0]))
    return lines


def summary_table(run_dir: str | Path) -> str:
    """Stages and bits per byte of a run, for the console; says plainly what is missing.

    Raises ValueError when run_dir does not exist.
    """
    run = read_run(run_dir)
    blocks = []
    if run.stages:
        blocks.append("\n".join(aligned(*stage_cells(run))))
    if run.points:
        blocks.append("\n".join(aligned(*bits_cells(run))))
    if run.notes:
        blocks.append("\n".join(run.notes))
    return "\n\n".join(blocks)
