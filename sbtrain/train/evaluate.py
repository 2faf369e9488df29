"""Bits per byte of a model on the held-out text of each source, on any layout; kept in evaluation.json."""

from __future__ import annotations

import math
from pathlib import Path

from parallel.mesh import Mesh
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

    def bits_per_byte(self, model, mesh: Mesh) -> dict:
        """{source: {bits_per_byte, tokens, bytes}}. Collective; the same on every rank."""
        sources = {}
        for name, rows in self.rows.items():
            sums = evaluate_rows(model, mesh, rows)
            nats, num_tokens = sum(s.loss for s in sums), sum(s.num_tokens for s in sums)
            bits_per_byte = nats / math.log(2) / max(self.num_bytes[name], 1)
            sources[name] = {"bits_per_byte": bits_per_byte, "tokens": num_tokens, "bytes": self.num_bytes[name]}
        return sources


class Evaluations:
    """evaluation.json: one point per model that was judged, `teacher`, `start`, then the stages by name."""

    def __init__(self, run_dir: Path, held_out: HeldOut):
        self.path, self.held_out = run_dir / "evaluation.json", held_out
        self.points = read_json(self.path)["points"] if self.path.exists() else []

    def due(self, name: str) -> bool:
        """Whether there is held-out text and this point is not known yet."""
        return bool(self.held_out.rows) and name not in [point["name"] for point in self.points]

    def add(self, name: str, model, mesh: Mesh, *, tokens: int) -> None:
        """Judge the model and append the point. tokens: trained so far. Collective; rank 0 writes and prints."""
        sources = self.held_out.bits_per_byte(model, mesh)
        mean = sum(source["bits_per_byte"] for source in sources.values()) / len(sources)
        self.points = [*self.points, {"name": name, "tokens": tokens, "sources": sources, "mean": mean}]
        if mesh.rank == 0:
            write_json(self.path, {"points": self.points})
            figures = ", ".join(f"{key} {value['bits_per_byte']:.3f}" for key, value in sources.items())
            print(f"bits per byte, {name}: {mean:.3f} ({figures})", flush=True)
