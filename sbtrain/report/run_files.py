"""The files of a run directory as the report reads them. A part that is missing or damaged is named, never fatal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml


@dataclass(frozen=True)
class RunFiles:
    """recipe, ledger: as parsed; records: steps of metrics.jsonl in order; points: of evaluation.json, in order.

    start: what start.json says of the first weights; most runs measure nothing for them and have none.
    spiking: what suite spiking has measured, evaluation/spiking.json; empty where it was not run.
    notes: one sentence for each part that is missing or unreadable.
    """

    folder: Path
    recipe: dict
    ledger: dict
    records: list[dict]
    points: list[dict]
    notes: tuple[str, ...]
    start: dict = field(default_factory=dict)
    spiking: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run: the recipe's, or the folder's."""
        return str(self.recipe.get("name") or self.folder.resolve().name)

    @property
    def stages(self) -> dict[str, dict]:
        """Stages by name in recipe order; those that only the metrics know come last, with nothing planned."""
        stages = dict(self.recipe.get("stages") or {})
        for record in self.records:
            stages.setdefault(record["stage"], {})
        return stages


def read_run(run_dir: str | Path) -> RunFiles:
    """Read a run directory. Raises ValueError when the folder itself does not exist."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run directory; give the run_dir of a training run")
    notes = []
    recipe = read_part(folder / "recipe.yaml", yaml.safe_load, dict, "the plan of the run is not known", notes)
    ledger = read_part(folder / "ledger.json", json.loads, dict, "which stages are finished is not known", notes)
    evaluation = read_part(folder / "evaluation.json", json.loads, dict, "there are no bits per byte", notes)
    start = None
    if (folder / "start.json").exists():
        start = read_part(folder / "start.json", json.loads, dict, "how the experts began is not known", notes)
    spiking = None
    if (folder / "evaluation" / "spiking.json").exists():
        spiking = read_part(folder / "evaluation" / "spiking.json", read_spiking, dict, "spikes are not shown", notes)
    records = read_part(folder / "metrics.jsonl", read_lines, list, "there are no training curves", notes)
    return RunFiles(
        folder=folder,
        recipe=recipe or {},
        ledger=ledger or {},
        records=[record for record in records or [] if {"step", "tokens", "stage"} <= record.keys()],
        points=comparable((evaluation or {}).get("points", []), notes),
        notes=tuple(notes),
        start=start or {},
        spiking=spiking or {},
    )


def comparable(points: list[dict], notes: list[str]) -> list[dict]:
    """The points measured as the newest one was; a note counts the others."""
    points = [point for point in points if point.get("sources")]
    same = [point for point in points if point.get("settings") == points[-1].get("settings")]
    if len(same) < len(points):
        left_out = len(points) - len(same)
        notes.append(f"{left_out} points of evaluation.json, of other evaluation settings, are left out.")
    return same


def read_part(path: Path, parse, kind: type, consequence: str, notes: list[str]):
    """Parse one file, or add a note that says what its absence means and return None."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"holds no {kind.__name__}")
        if value:
            return value
        notes.append(f"{path.name} is empty: {consequence}.")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: {consequence}.")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        notes.append(f"{path.name} cannot be read ({reason}): {consequence}.")
    return None


def read_spiking(text: str) -> dict:
    """What suite spiking wrote. Raises ValueError where a part of it is missing."""
    value = json.loads(text)
    parts = {"model", "off", "sweep", "shown", "rasters"}
    if not isinstance(value, dict) or not parts <= value.keys():
        raise ValueError("is no result of suite spiking")
    return value


def read_lines(text: str) -> list[dict]:
    """The objects of a JSON lines file; a torn line (a killed writer leaves one) is left out."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
