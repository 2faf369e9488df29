"""Bits per byte of a model on the held-out text of each source, on any layout; kept in evaluation.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from parallel.collectives import together
from parallel.mesh import Mesh
from parallel.place import section
from parallel.schedule import evaluate_rows
from sbtrain.checkpoint.files import read_json, write_json
from sbtrain.config.schema import Recipe
from sbtrain.data import tokenizer as tokenizers
from sbtrain.data.heldout import heldout_rows, scored_bytes


class HeldOut:
    """The held-out rows of a recipe. Empty where evaluation.tokens is 0 or no source has held-out text."""

    def __init__(self, recipe: Recipe):
        """Reads the corpora. Raises ValueError naming the file that is missing, damaged or of another tokenizer."""
        self.rows, self.num_bytes = {}, {}
        if recipe.evaluation.tokens <= 0 or not recipe.data.tokenizer:
            return
        tokenizer = tokenizers.load(recipe.data.tokenizer)
        seq_len = recipe.evaluation.seq_len or max(stage.seq_len for stage in recipe.stages.values())
        for name, source in recipe.data.sources.items():
            if source.valid:
                rows = heldout_rows(source.valid, seq_len=seq_len, tokens=recipe.evaluation.tokens, tokenizer=tokenizer)
                self.rows[name], self.num_bytes[name] = rows, scored_bytes(rows, tokenizer.token_bytes())

    @property
    def settings(self) -> dict:
        """What makes two points comparable: the rows of each source by number and length, and their bytes."""
        return {
            name: {"rows": len(rows), "seq_len": len(rows[0].tokens), "bytes": self.num_bytes[name]}
            for name, rows in self.rows.items()
        }

    def bits_per_byte(self, model, mesh: Mesh, *, must_stop: Callable[[], bool]) -> dict | None:
        """{source: {bits_per_byte, tokens, bytes}}, or None once must_stop says so. Collective; the same everywhere.

        model: a stage or the list of its chunks.
        """
        sources, at_once = {}, mesh.dp * mesh.layout.pp
        for name, rows in self.rows.items():
            nats, num_tokens = 0.0, 0
            for first in range(0, len(rows), at_once):
                if must_stop():
                    return None
                sums = evaluate_rows(model, mesh, rows[first : first + at_once])
                nats, num_tokens = nats + sum(s.loss for s in sums), num_tokens + sum(s.num_tokens for s in sums)
            bits_per_byte = nats / math.log(2) / max(self.num_bytes[name], 1)
            sources[name] = {"bits_per_byte": bits_per_byte, "tokens": num_tokens, "bytes": self.num_bytes[name]}
        return sources


class Evaluations:
    """evaluation.json: one point per model that was judged, `teacher`, `start`, then the stages by name.

    A run that goes on with other evaluation settings adds points of its own; the earlier ones stay in the file.
    """

    def __init__(self, run_dir: Path, held_out: HeldOut):
        self.path, self.held_out = run_dir / "evaluation.json", held_out
        self.points = _points(self.path) if self.path.exists() else []

    def due(self, name: str) -> bool:
        """Whether there is held-out text and this point is not known yet."""
        known = [(point["name"], point.get("settings")) for point in self.points]
        return bool(self.held_out.rows) and (name, self.held_out.settings) not in known

    def add(self, name: str, model, mesh: Mesh, *, tokens: int, must_stop: Callable[[], bool]) -> bool:
        """Judge the model and append the point; False, and no point, if it had to stop.

        tokens: trained so far. must_stop: asked between rows. Collective; rank 0 writes and prints.
        """
        with section("evaluation"):
            sources = self.held_out.bits_per_byte(model, mesh, must_stop=must_stop)
        if sources is None:
            return False
        mean = sum(source["bits_per_byte"] for source in sources.values()) / len(sources)
        point = {"name": name, "tokens": tokens, "sources": sources, "mean": mean, "settings": self.held_out.settings}
        self.points = [*self.points, point]
        together(lambda: write_json(self.path, {"points": self.points}) if mesh.rank == 0 else None)
        if mesh.rank == 0:
            figures = ", ".join(f"{key} {value['bits_per_byte']:.3f}" for key, value in sources.items())
            print(f"bits per byte, {name}: {mean:.3f} ({figures})", flush=True)
        return True


def _points(path: Path) -> list[dict]:
    content = read_json(path)
    points = content.get("points") if isinstance(content, dict) else None
    if not isinstance(points, list) or not all(isinstance(point, dict) and "name" in point for point in points):
        raise ValueError(f"{path} holds no points; restore it from a copy, or remove it and they are measured again")
    return points
