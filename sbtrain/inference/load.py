"""A model ready to run in this process: from a training run, a source checkpoint, or one of our exports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import ops
from parallel.collectives import together
from parallel.mesh import Mesh, device
from sbtrain.checkpoint.reading import read_state
from sbtrain.checkpoint.run_dir import open_run
from sbtrain.config.hf_shape import FAMILIES, read_config, read_shape
from sbtrain.config.rules import algorithm_problem
from sbtrain.config.schema import ModelConfig, Precision, Recipe
from sbtrain.convert.calibrated import FILE, Calibrated, Int8Reader
from sbtrain.convert.exported import MODEL_TYPES, fill_exported, read_model
from sbtrain.convert.folder import FolderReader
from sbtrain.convert.reader import CheckpointReader, GlobalReader
from sbtrain.convert.start import fill
from sbtrain.data import tokenizer as tokenizers
from sbtrain.data.tokenizer import Tokenizer, check_vocabulary
from sbtrain.inference.int8 import Int8Weights, check_groups, fill_int8, swap
from sbtrain.model.build import build_model, global_buffers, global_parameters
from sbtrain.model.hybrid import HybridModel


@dataclass(frozen=True)
class Where:
    """Which weights. Exactly one of model and run is given.

    model: a Hugging Face folder, of a source family (full attention in every layer) or exported by us.
    run: a run directory. step: one of its checkpoints by number; "" takes the newest.
    precision: fp32 or bf16; "" takes bf16 on a GPU and fp32 on a CPU.
    int8: projections that spike run on INT8 weights and counts, as integers: those of a W8ASpike folder, or those that
    launch/calibrate.py has made, in the folder `calibrated` where it was told another one than it takes by itself.
    """

    model: str = ""
    run: str = ""
    step: str = ""
    precision: str = ""
    int8: bool = False
    calibrated: str = ""

    @property
    def folder(self) -> Path:
        """Where results about these weights belong."""
        return Path(self.run or self.model)

    def check(self) -> None:
        """Raise ValueError, one line naming the key, where the fields alone are wrong."""
        if bool(self.model) == bool(self.run):
            raise ValueError("give model=FOLDER (a Hugging Face folder) or run=FOLDER (a run directory), one of them")
        if self.step and not self.run:
            raise ValueError("step= picks a checkpoint of run=; drop it, or give run= instead of model=")
        known = [kind.value for kind in Precision]
        if self.precision and self.precision not in known:
            raise ValueError(f"precision={self.precision} is not known; choose one of {', '.join(known)}")
        if self.calibrated and not self.int8:
            raise ValueError("calibrated= says where int8=true finds its weights; give that too, or drop it")

    def refuse_int8(self, what: str) -> None:
        """Raise ValueError where int8 is asked for and `what` cannot do it."""
        if self.int8:
            raise ValueError(f"int8=true: {what}; drop int8=")


@dataclass(frozen=True)
class Loaded:
    """A model, whole on every rank of its mesh, in eval mode, with its tokenizer.

    stop_ids: token ids that end a text. recipe: of the run it comes from, None for a folder. origin: what was read.
    """

    model: HybridModel
    config: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    stop_ids: frozenset[int]
    recipe: Recipe | None
    origin: Path


@dataclass(frozen=True)
class Source:
    """Weights to be read one by one. reader: by our global names. tokenizer_dir, origin: folders. recipe: of a run."""

    config: ModelConfig
    reader: GlobalReader
    tokenizer_dir: Path
    origin: Path
    recipe: Recipe | None = None


def check_alone(mesh: Mesh, what: str) -> None:
    """Raise ValueError where several processes would each do the same."""
    if mesh.dp > 1:
        raise ValueError(f"{what} runs in one process, this is one of {mesh.world_size}; start it without torchrun")


def open_source(where: Where) -> Source:
    """The weights that load_model would load, and no model. For one process. Raises what load_model raises."""
    where.check()
    if where.run:
        recipe, step_dir, folder = _find_run(where)
        return Source(recipe.model, CheckpointReader(step_dir), folder, step_dir, recipe)
    folder = Path(where.model)
    with _in_terms_of_model():
        config, _ = _read_shape(folder)
        return Source(config, FolderReader(folder, config), folder, folder)


def calibrated_folder(where: Where, source: Source) -> Path:
    """Where calibration of these weights puts INT8 weights unless told otherwise."""
    return Path(where.run) / "calibrated" / source.origin.name if where.run else source.origin / "calibrated"


def load_model(where: Where, mesh: Mesh, *, change: Callable[[ModelConfig], ModelConfig] | None = None) -> Loaded:
    """Build the model on the mesh's device and stream its weights into it; the optimizer is not read.

    change: of the configuration before the model is built; it must leave the parameters as they are. Not with int8.
    mesh: of sp ranks alone; it must stay open as long as the model is used. Collective: ranks time their links where
    layout.sp_algorithm is auto. Raises ValueError, one line naming the key or file and the fix, for folders and files
    that are missing, damaged or do not fit together; what one rank cannot read, all refuse.
    """
    where.check()
    check_alone(mesh, "inference")
    if where.int8:
        assert change is None
        return _on_int8(where, mesh)
    change = change or (lambda config: config)
    return _from_run(where, mesh, change) if where.run else _from_folder(where, mesh, change)


def _from_run(where: Where, mesh: Mesh, change: Callable[[ModelConfig], ModelConfig]) -> Loaded:
    recipe, step_dir, folder = together(lambda: _find_run(where))
    config = change(recipe.model)
    model = _build(config, mesh, where)
    together(lambda: _fill_from_run(model, step_dir))
    if config.spiking.enabled and config.spiking.warm_in_tokens:
        _warm_in(model, together(lambda: read_state(step_dir))["tokens"], mesh, step_dir)
    return together(lambda: _loaded(model, config, mesh, folder, recipe=recipe, origin=step_dir))


def _on_int8(where: Where, mesh: Mesh) -> Loaded:
    source, config, weights = together(lambda: _find_int8(where))
    model = _build(config, mesh, where)
    projections = swap(model, sorted(weights.int8_names))
    with _in_terms_of_model():
        together(lambda: fill_int8(model, projections, weights))
    about = dict(recipe=source.recipe, origin=source.origin)
    return together(lambda: _loaded(model, config, mesh, source.tokenizer_dir, **about))


def _find_int8(where: Where) -> tuple[Source, ModelConfig, Int8Weights]:
    """What the weights are of, the INT8 model, and its weights."""
    source = open_source(where)
    if isinstance(source.reader, FolderReader) and source.reader.int8_names:
        if where.calibrated:
            raise ValueError(f"calibrated= does not go with {source.origin}, which has INT8 weights itself; drop it")
        check_groups(source.config, source.origin)
        return source, source.config, source.reader
    folder = Path(where.calibrated) if where.calibrated else calibrated_folder(where, source)
    if not (folder / FILE).is_file():
        what = " ".join(f"{key}={getattr(where, key)}" for key in ("run", "model", "step") if getattr(where, key))
        raise ValueError(
            f"int8=true: {folder} has no calibrated weights; make them with: "
            f"python launch/calibrate.py {what} data=PREFIX"
        )
    calibrated = Calibrated(folder)
    check_groups(calibrated.model, folder)
    calibrated.check(source.config, source.reader)
    config = replace(calibrated.model, max_positions=source.config.max_positions)
    return source, config, Int8Reader(source.reader, source.config, calibrated)


def _find_run(where: Where) -> tuple[Recipe, Path, Path]:
    """The recipe, the checkpoint's folder and the tokenizer's; from now on the ops are the recipe's."""
    recipe, step_dir = open_run(where.run, where.step)
    folders = [folder for folder in (recipe.data.tokenizer, recipe.start.path) if folder]
    with_tokenizer = [folder for folder in folders if (Path(folder) / "tokenizer.json").is_file()]
    if not with_tokenizer:
        places = " or ".join(folders) or "data.tokenizer"
        raise ValueError(f"run={where.run}: no tokenizer.json in {places}; put it back")
    if device().type != "cpu":  # where the reference runs, whatever the recipe says
        ops.use(recipe.ops)
    return recipe, step_dir, Path(with_tokenizer[0])


def _warm_in(model: HybridModel, tokens: int, mesh: Mesh, step_dir: Path) -> None:
    """Replace activations by spikes as far as training had come, as its own evaluations did; say so if not fully."""
    model.spike_steps.trained(tokens)
    share = model.model_config.spiking.share_after(tokens)
    if share < 1 and mesh.rank == 0:
        print(f"{step_dir}: {share:.1%} of model.spiking.warm_in_tokens are done, so much of an activation spikes")


@torch.no_grad()
def _fill_from_run(model: HybridModel, step_dir: Path) -> None:
    reader = CheckpointReader(step_dir)
    for name, parameter in {**global_parameters(model), **_saved_buffers(model)}.items():
        tensor = reader.get(name)
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{step_dir}: {name} is {list(tensor.shape)}, recipe.yaml beside it describes "
                f"{list(parameter.shape)}; restore the recipe.yaml of this run"
            )
        parameter.copy_(tensor)


def _from_folder(where: Where, mesh: Mesh, change: Callable[[ModelConfig], ModelConfig]) -> Loaded:
    folder = Path(where.model)
    with _in_terms_of_model():
        config, exported = together(lambda: _read_shape(folder))
        config = change(config)
        model = _build(config, mesh, where)
        together(lambda: _fill_from_folder(model, folder, exported=exported))
    return together(lambda: _loaded(model, config, mesh, folder, recipe=None, origin=folder))


def _read_shape(folder: Path) -> tuple[ModelConfig, bool]:
    """The model of a Hugging Face folder, and whether it is one of our exports."""
    if not folder.is_dir():
        raise ValueError(f"model={folder} is not a folder; give a Hugging Face folder (config.json and safetensors)")
    family = read_config(folder).get("model_type")
    if family not in (*FAMILIES, *MODEL_TYPES):
        raise ValueError(
            f"{folder / 'config.json'}: model_type {family!r} is not supported; supported: "
            f"{', '.join((*FAMILIES, *MODEL_TYPES))}"
        )
    exported = family in MODEL_TYPES
    return read_model(folder) if exported else ModelConfig(pattern="F", **read_shape(folder)), exported


def _fill_from_folder(model: HybridModel, folder: Path, *, exported: bool) -> None:
    parameters, config = global_parameters(model), model.model_config
    if exported:
        fill_exported({**parameters, **_saved_buffers(model)}, model=config, path=folder)
    else:
        fill(parameters, model=config, path=str(folder), seed=0)


def _saved_buffers(model: HybridModel) -> dict[str, torch.Tensor]:
    """Buffers that decide what the model computes: the biases by which routers balance their choices."""
    return {name: buffer for name, buffer in global_buffers(model).items() if name.endswith("router.expert_bias")}


@contextmanager
def _in_terms_of_model() -> Iterator[None]:
    """Readers of checkpoints name the recipe's key; here the user has written model=."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("start.path", "model")) from None


def _build(config: ModelConfig, mesh: Mesh, where: Where) -> HybridModel:
    default = Precision.bf16 if mesh.device.type == "cuda" else Precision.fp32
    precision = Precision(where.precision) if where.precision else default
    # prompts of any length are read: a window that is longer than one is no problem
    problem = algorithm_problem(config, mesh.layout, seq_len=config.window)
    if problem:
        raise ValueError(problem.removeprefix("layout."))
    return build_model(config, mesh, precision=precision, seq_len=config.window).eval()


def _loaded(model: HybridModel, config: ModelConfig, mesh: Mesh, folder: Path, **about) -> Loaded:
    """folder: the tokenizer's."""
    tokenizer = tokenizers.load(folder)
    check_vocabulary(tokenizer, config.vocab_size)
    return Loaded(model, config, tokenizer, mesh, _stop_ids(folder, tokenizer), **about)


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The end of a document, and what the model's own generation settings stop at (chat models end turns)."""
    ids = {tokenizer.eos_id}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        ids.update(i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int))
    return frozenset(ids)
