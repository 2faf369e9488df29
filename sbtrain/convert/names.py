"""What our two families of export formats call the tensors of sbtrain.convert.weights.table."""

from __future__ import annotations

_RELEASED = {
    "embed_tokens": "embeddings",
    "input_layernorm": "attn_norm",
    "self_attn": "attn",
    "post_attention_layernorm": "mlp_norm",
}
_PARALLEL = {"self_attn": "attn"}


def exported_name(name: str, model_type: str) -> str:
    """The tensor's name in a folder of that model_type.

    gla_swa and sbtrain_hybrid name as the released SpikingBrain-7B does; sbtrain_moe as Qwen2 and, inside of `attn` and
    `mlp`, for each mixer of a pair and each expert.
    """
    renamed = _PARALLEL if model_type == "sbtrain_moe" else _RELEASED
    return ".".join(renamed.get(part, part) for part in name.split("."))
