"""A small random model on a one-rank mesh, and a byte-level tokenizer, for the tests of inference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from parallel.mesh import Mesh
from parallel.sequence.shard import Documents
from plain_model import plain_logits
from sbtrain.checkpoint.files import write_json
from sbtrain.config.load import save
from sbtrain.config.model_schema import GLAConfig, ModelConfig
from sbtrain.config.schema import DataConfig, Precision, Recipe, Stage
from sbtrain.convert.export import export
from sbtrain.data import tokenizer as our_tokenizers
from sbtrain.inference.load import Loaded
from sbtrain.model.build import build_model, global_parameters
from sbtrain.model.hybrid import HybridModel
from sharding import global_state, hf_state
from whole_checkpoint import make_whole

EOS = 256
STAGE = Stage(seq_len=32, tokens=64, global_batch_tokens=64)
MODEL = ModelConfig(
    pattern="LS", vocab_size=260, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40,
    norm_eps=1e-5, rope_theta=1e4, max_positions=512, tie_embeddings=False, qkv_bias=True, qk_norm=False, window=7,
    gla=GLAConfig(), vocab_multiple=32,
)  # fmt: skip


def write_tokenizer(folder: Path) -> Path:
    """A token for every byte, and 256, the end of a document; 257 to 259 of the model's vocabulary are unused."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = tokenizers.decoders.ByteLevel()
    byte_level.add_special_tokens(["<eos>"])
    byte_level.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def build(config: ModelConfig, mesh: Mesh, *, seed: int = 0, precision: Precision = Precision.fp32) -> HybridModel:
    """The model with the weights of global_state(config, seed)."""
    model = build_model(config, mesh, precision=precision, seq_len=64).eval()
    state = global_state(config, seed=seed)
    with torch.no_grad():
        for name, parameter in global_parameters(model).items():
            parameter.copy_(state[name])
    return model


def loaded_model(folder: Path, mesh: Mesh, **changes) -> Loaded:
    """As load_model returns it."""
    config = replace(MODEL, **changes)
    tokenizer = our_tokenizers.load(write_tokenizer(folder))
    return Loaded(build(config, mesh), config, tokenizer, mesh, frozenset([EOS]), None, folder)


def parallel_logits(model: HybridModel, tokens: Tensor) -> Tensor:
    """Logits [T, vocab] of one document in one forward, without a cache."""
    whole = torch.tensor([0, len(tokens)], dtype=torch.int32)
    with torch.no_grad():
        return model(tokens, Documents(whole, torch.arange(len(tokens))))


def exact_logits(config: ModelConfig, tokens: Tensor) -> Tensor:
    """The same from plain torch in float64."""
    return plain_logits(hf_state(global_state(config, dtype=torch.float64), config), config, tokens)


class DictReader:
    """A checkpoint in memory."""

    def __init__(self, state):
        self.get = state.__getitem__


def write_export(folder, config):
    tokenizer = write_tokenizer(folder.parent / "tokenizer")
    export(DictReader(global_state(config)), model=config, out=folder, dtype="fp32", tokenizer_dir=tokenizer)
    return folder


def write_run(run, config, *, step=5):
    """What a training run leaves, as far as it is read here."""
    tokenizer = write_tokenizer(run.parent / "tokenizer")
    folder = run / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    dcp.save(global_state(config), checkpoint_id=folder, no_dist=True)
    make_whole(folder)
    recipe = Recipe(name="tiny", model=config, data=DataConfig(tokenizer=str(tokenizer)), stages={"ctx_32": STAGE})
    save(recipe, run / "recipe.yaml")
    write_json(run / "ledger.json", {"stages_done": [], "checkpoint": f"checkpoints/step_{step}", "step": step})
    return run
