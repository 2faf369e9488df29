"""Our own exports read back: config.json to a ModelConfig, tensors to parameters.

Both formats of sbtrain.convert.export, hence the folder format of the released SpikingBrain-7B as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sbtrain.config.hf_shape import read_config
from sbtrain.config.model_schema import GLAConfig, ModelConfig, RopeScaling
from sbtrain.convert.export import released_name
from sbtrain.convert.hf import HFCheckpoint
from sbtrain.convert.weights import table

MODEL_TYPES = ("gla_swa", "sbtrain_hybrid")


def read_model(folder: str | Path) -> ModelConfig:
    """The configuration of an exported model. Raises ValueError, one line, naming the file and the key."""
    from sbtrain.convert.hf_model.configuration_gla_swa import GLAswaConfig

    path, values = Path(folder) / "config.json", read_config(folder)
    if values.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{path}: model_type {values.get('model_type')!r} is none of {', '.join(MODEL_TYPES)}")
    try:
        theirs = GLAswaConfig(**{key: value for key, value in values.items() if key != "model_type"})
        scaling = theirs.llama3_rope and RopeScaling(**theirs.llama3_rope)
        return ModelConfig(
            pattern="".join(theirs.kind(layer) for layer in range(theirs.num_hidden_layers)),
            vocab_size=theirs.vocab_size,
            hidden_size=theirs.hidden_size,
            num_layers=theirs.num_hidden_layers,
            num_heads=theirs.num_attention_heads,
            num_kv_heads=theirs.num_key_value_heads,
            head_dim=theirs.head_dim,
            ffn_size=theirs.intermediate_size,
            norm_eps=float(theirs.norm_eps),
            rope_theta=float(theirs.rope_theta),
            rope_scaling=scaling or None,
            max_positions=theirs.max_position_embeddings,
            tie_embeddings=theirs.tie_word_embeddings,
            qkv_bias=theirs.qkv_bias,
            qk_norm=theirs.qk_norm,
            window=theirs.sliding_window + 1,
            gla=GLAConfig(gate_rank=theirs.gate_low_rank_dim, gate_normalizer=float(theirs.gate_logit_normalizer)),
        )
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not describe a model ({error}); export the model again") from None


@torch.no_grad()
def fill_exported(parameters: dict[str, Tensor], *, model: ModelConfig, path: str | Path) -> None:
    """Fill the parameters of an unsharded model (any float dtype, any device) by global name, tensor by tensor.

    Raises ValueError, one line, when a tensor is missing, unused or of another shape.
    """
    reader = _Renamed(path)
    rows = {row.name: row for row in table(model)}
    wanted = {released_name(source.name) for row in rows.values() for source in row.sources}
    unused = sorted(set(reader.checkpoint.names()) - wanted)
    if unused:
        raise ValueError(
            f"{path} holds tensor {unused[0]}, which its config.json gives no place ({len(unused)} unused); "
            "export the model again"
        )
    for name, parameter in parameters.items():
        rows[name].copy_into(parameter, reader, tp_rank=0, tp=1)


class _Renamed:
    """Exported tensors under the names of the source family."""

    def __init__(self, path: str | Path):
        self.checkpoint = HFCheckpoint(path)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(released_name(name))

    def get(self, name: str) -> Tensor:
        return self.checkpoint.get(released_name(name))

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self.checkpoint.get_slice(released_name(name), dim, start, stop)
