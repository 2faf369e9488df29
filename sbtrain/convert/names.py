"""What our two families of export formats call the tensors of sbtrain.convert.weights.table."""

from __future__ import annotations

from sbtrain.config.spiking_export import SCALES

_RELEASED = {
    "embed_tokens": "embeddings",
    "input_layernorm": "attn_norm",
    "self_attn": "attn",
    "post_attention_layernorm": "mlp_norm",
}
_PARALLEL = {"self_attn": "attn"}


_PROJECTIONS = {
    "qkv": ("linear_qkv", "q_proj", "k_proj", "v_proj"),
    "gate": ("gate", "gk_proj"),
    "proj": ("linear_proj", "o_proj"),
    "gate_up": ("linear_fc1", "gate_proj", "up_proj"),
    "down": ("linear_fc2", "down_proj"),
}
"""What model.spiking calls a projection -> what its weights are called, by us and by the family."""


def projection_of(name: str) -> tuple[str, int] | None:
    """(projection, layer) of a projection's weight, by our name for it or the table's; None for other tensors."""
    parts = name.split(".")
    if len(parts) < 4 or parts[1] != "layers" or parts[-1] != "weight":
        return None
    leaf = parts[-2].removeprefix("la_").removeprefix("swa_").removeprefix("fa_")
    found = [projection for projection, leaves in _PROJECTIONS.items() if leaf in leaves]
    return (found[0], int(parts[2])) if found else None


def scales_name(name: str) -> str:
    """The name of the scales of a projection's weight."""
    return name.removesuffix(".weight") + SCALES


def exported_name(name: str, model_type: str) -> str:
    """The tensor's name in a folder of that model_type.

    gla_swa and sbtrain_hybrid name as the released SpikingBrain-7B does; sbtrain_moe as Qwen2 and, inside of `attn` and
    `mlp`, for each mixer of a pair and each expert.
    """
    renamed = _PARALLEL if model_type == "sbtrain_moe" else _RELEASED
    return ".".join(renamed.get(part, part) for part in name.split("."))
