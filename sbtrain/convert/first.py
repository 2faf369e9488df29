"""The first weights of a run on a layout: what is measured before they are set, setting them, and checking them.

What was measured is kept in start.json of the run directory: the branch norms that pairs start with, and how far the
upcycled experts are from the dense FFNs. Reports read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from parallel.mesh import Mesh
from parallel.place import section
from parallel.schedule import chunks_of, evaluate_rows
from parallel.sequence.shard import Row
from sbtrain.checkpoint.files import write_json
from sbtrain.config.mixer_rules import teacher_cut_problem
from sbtrain.config.model_schema import MergeInit, MetaInit, ModelConfig
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.schema import Recipe
from sbtrain.convert.calibrate import output_strengths, teacher_of
from sbtrain.convert.start import fill, starts_from_export
from sbtrain.convert.upcycle import alpha_of, expected_weight
from sbtrain.convert.upcycle_check import dense_of, ffn_differences, moe_layers
from sbtrain.model.build import build_chunks, global_buffers, global_parameters
from sbtrain.spiking.neuron import without_spikes

FILE = "start.json"


class FirstWeights:
    """A run's first weights. Collective: every rank calls prepare, fill and check with the same recipe.

    seq_len: of the stage that begins. read_rows(num_tokens): the first rows of its data that hold so many tokens, the
    same on every rank and every layout; None where the run has no data.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, *, seq_len: int, read_rows: Callable[[int], list[Row]] | None):
        self.recipe, self.mesh, self.seq_len = recipe, mesh, seq_len
        self.converts = bool(recipe.start.path) and not starts_from_export(recipe.start.path)
        self.merge_norms: dict[int, float] = {}
        self.meta_ids: list[int] = []
        self.measured: dict = {}
        self._read_rows, self._rows, self._dense_loss = read_rows, [], 0.0

    def prepare(self) -> None:
        """Measure, on models that are built and dropped here, what the first weights need and are judged by."""
        model = self.recipe.model
        pairs = [i for i, kind in enumerate(parse_pattern(model.pattern, model.num_layers)) if len(kind.mixers) > 1]
        calibrates = bool(pairs) and model.pair.norm_init is MergeInit.calibrated
        copies = model.meta.num_tokens > 0 and model.meta.init is MetaInit.frequent
        if not self.converts or self._read_rows is None:
            self._say_what_is_left_out(calibrates=calibrates, copies=copies)
            return
        if not (calibrates or copies or moe_layers(model)):
            return
        self._rows = self._read_rows(model.pair.calibration_tokens)
        if copies:
            self.meta_ids = commonest(self._rows, model.meta.num_tokens)
            self.measured["meta_tokens"] = {"tokens": self._num_tokens, "copies_of": self.meta_ids}
        if calibrates:
            self._calibrate(pairs)
        if moe_layers(model):
            with section("loss of the dense model"):
                dense = self._built(dense_of(model))
                self._dense_loss = self._loss(dense)

    def fill(self, model) -> None:
        """Set this rank's parameters to the recipe's first weights. model: a stage or the list of its chunks."""
        fill_model(self.recipe, model, self.mesh, merge_norms=self.merge_norms, meta_ids=self.meta_ids)

    def check(self, model) -> None:
        """Measure what upcycling has changed, on the model with its first weights, and keep and print all measured."""
        if self._rows and moe_layers(self.recipe.model):
            with section("check of the upcycled experts"), without_spikes(chunks_of(model)):
                self._check_upcycling(model)
        if self.measured and self.mesh.rank == 0:
            write_json(Path(self.recipe.run_dir) / FILE, self.measured)

    def _say_what_is_left_out(self, *, calibrates: bool, copies: bool) -> None:
        if starts_from_export(self.recipe.start.path):
            return
        missing = "start.path" if not self.recipe.start.path else "data"
        if calibrates:
            self._say(f"model.pair.norm_init=calibrated: there is no {missing}, the branch norms start at one")
        if copies:
            self._say(f"model.meta.init=frequent: there is no {missing}, the meta tokens start at random")

    def _calibrate(self, pairs: list[int]) -> None:
        model, num_tokens = self.recipe.model, len(self._rows[0].tokens)
        problem = teacher_cut_problem(model, self.mesh.layout, row_tokens=num_tokens)
        if problem:
            raise ValueError(
                f"model.pair.norm_init=calibrated: {num_tokens} tokens of the source, which has no meta tokens,"
                f"{problem}; begin with a seq_len that can be, or set norm_init=ones"
            )
        with section("calibration"):
            teacher = self._built(teacher_of(model, self.mesh.layout, seq_len=self.seq_len))
            before = model.pair.norms_before_projection
            strengths = output_strengths(teacher, self.mesh, self._rows, before_projection=before)
        self.merge_norms = {layer: strengths[layer] for layer in pairs}
        self.measured["calibration"] = {"tokens": self._num_tokens, "merge_norms": self.merge_norms}
        low, high = min(self.merge_norms.values()), max(self.merge_norms.values())
        self._say(f"branch norms of {len(pairs)} pairs start at the teacher's output RMS, {low:.4g} to {high:.4g}")

    def _check_upcycling(self, model) -> None:
        differences = ffn_differences(model, self.mesh, self._rows[0], path=self.recipe.start.path)
        errors = {layer: error for layer, (error, _) in differences.items()}
        weight = sum(weight for _, weight in differences.values()) / len(differences)
        loss, worst = self._loss(model), max(errors, key=errors.get)
        moe = self.recipe.model.moe
        self.measured["upcycling"] = {
            "tokens": self._num_tokens,
            "alpha": alpha_of(moe),
            "relative_errors": errors,
            "routing_weight": weight,
            "expected_routing_weight": expected_weight(moe),
            "loss_dense": self._dense_loss,
            "loss": loss,
        }
        self._say(
            f"{len(errors)} FFNs upcycled, matrices times {alpha_of(moe):.5f}: outputs differ by "
            f"{sum(errors.values()) / len(errors):.2%} of the dense ones, at most {errors[worst]:.2%} (layer {worst}); "
            f"routing weights add up to {weight:.4f}, {expected_weight(moe):.4f} expected; "
            f"loss {loss:.4f}, {self._dense_loss:.4f} with dense FFNs"
        )

    def _built(self, model: ModelConfig):
        """Another model on this layout, with its first weights."""
        built = build_chunks(model, self.mesh, precision=self.recipe.precision, seq_len=self.seq_len)
        fill_model(self.recipe, built, self.mesh, merge_norms=self.merge_norms, meta_ids=self.meta_ids)
        return built

    def _loss(self, model) -> float:
        sums = evaluate_rows(model, self.mesh, self._rows)
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        return sum(row.loss for row in sums) / max(1, sum(row.num_tokens for row in sums))

    @property
    def _num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self._rows)

    def _say(self, text: str) -> None:
        if self.mesh.rank == 0:
            print(text, flush=True)


def commonest(rows: list[Row], num_tokens: int) -> list[int]:
    """That many ids of the rows' tokens, the commonest first (of equals the smaller), over again if there are fewer."""
    counts = torch.bincount(torch.cat([row.tokens for row in rows]))
    ids = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
    return [ids[i % len(ids)] for i in range(num_tokens)]


def fill_model(
    recipe: Recipe,
    model,
    mesh: Mesh,
    *,
    merge_norms: dict[int, float] | None = None,
    meta_ids: Sequence[int] = (),
) -> None:
    """Set this rank's parameters of a model of the recipe (or of its teacher) from start.path or the seed.

    model: a stage or the list of its chunks.
    """
    chunks = chunks_of(model)
    with section("first weights", patient=True):
        fill(
            global_parameters(*chunks),
            buffers=global_buffers(*chunks),
            model=chunks[0].model_config,
            path=recipe.start.path,
            seed=recipe.seed,
            tp_rank=mesh.tp_rank,
            tp=mesh.layout.tp,
            ep_rank=mesh.ep_rank,
            ep=mesh.layout.ep,
            merge_norms=merge_norms,
            meta_ids=meta_ids,
        )
