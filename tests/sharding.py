"""What a rank of a layout should hold of a global tensor, written from the naming contract alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sbtrain.config.pattern import parse_pattern

_ROWS = (
    "word_embeddings.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "gate_up.weight",
    "gate_up.bias",
    "output_layer.weight",
)
_EXPERTS = ("experts.linear_fc1", "experts.linear_fc2")
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def local_shard(name: str, whole: Tensor, *, tp_rank: int, tp: int, ep_rank: int = 0, ep: int = 1) -> Tensor:
    """The shard of a global tensor under one of our parameter names: experts by ep, all else by tp."""
    if name.endswith(_EXPERTS):
        return whole.chunk(ep)[ep_rank]
    if name.endswith("linear_fc1.weight"):
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(tp)[tp_rank], up.chunk(tp)[tp_rank]])
    if name.endswith(_ROWS):
        return whole.chunk(tp)[tp_rank]
    return whole.chunk(tp, dim=1)[tp_rank] if name.endswith(_COLUMNS) else whole


def global_state(model, *, seed: int = 0, dtype=torch.float32) -> dict[str, Tensor]:
    """Random weights of a small model under our global names, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head, kv = model.hidden_size, model.head_dim, model.num_kv_heads
    rows = (model.num_heads + 2 * kv) * head

    def random(*shape, scale=0.15, shift=0.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    state = {"embedding.word_embeddings.weight": random(model.padded_vocab_size, hidden, scale=0.5)}
    for i, kind in enumerate(parse_pattern(model.pattern, model.num_layers)):
        (symbol,) = kind.mixers
        mixer = f"decoder.layers.{i}.self_attention."
        state[f"decoder.layers.{i}.input_layernorm.weight"] = random(hidden, shift=1)
        state[mixer + "linear_qkv.weight"] = random(rows, hidden)
        if model.qkv_bias:
            state[mixer + "linear_qkv.bias"] = random(rows)
        state[mixer + "linear_proj.weight"] = random(hidden, model.num_heads * head)
        if symbol == "L":
            state[mixer + "gate_down.weight"] = random(model.gla.gate_rank, hidden)
            state[mixer + "gate_up.weight"] = random(kv * head, model.gla.gate_rank, scale=1)
            state[mixer + "gate_up.bias"] = random(kv * head)
            state[mixer + "out_norm.weight"] = random(head, shift=1)
        elif model.qk_norm:
            state[mixer + "q_norm.weight"], state[mixer + "k_norm.weight"] = (
                random(head, shift=1),
                random(head, shift=1),
            )
        state[f"decoder.layers.{i}.pre_mlp_layernorm.weight"] = random(hidden, shift=1)
        mlp = f"decoder.layers.{i}.mlp."
        if not kind.moe:
            state[mlp + "linear_fc1.weight"] = random(2 * model.ffn_size, hidden)
            state[mlp + "linear_fc2.weight"] = random(hidden, model.ffn_size)
            continue
        moe, width = model.moe, model.moe.expert_ffn_size or model.ffn_size
        state[mlp + "router.weight"] = random(moe.num_experts, hidden)
        state[mlp + "experts.linear_fc1"] = random(moe.num_experts, 2 * width, hidden)
        state[mlp + "experts.linear_fc2"] = random(moe.num_experts, hidden, width)
        if moe.num_shared_experts:
            shared = moe.num_shared_experts * width
            state[mlp + "shared_experts.linear_fc1.weight"] = random(2 * shared, hidden)
            state[mlp + "shared_experts.linear_fc2.weight"] = random(hidden, shared)
    state["decoder.final_layernorm.weight"] = random(hidden, shift=1)
    if not model.tie_embeddings:
        state["output_layer.weight"] = random(model.padded_vocab_size, hidden)
    return state


def hf_state(state: dict[str, Tensor], model) -> dict[str, Tensor]:
    """Our global tensors under the source family's names (see plain_model)."""
    out = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"][: model.vocab_size],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
    }
    if "output_layer.weight" in state:
        out["lm_head.weight"] = state["output_layer.weight"][: model.vocab_size]
    renamed = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.gate_down.weight": "self_attn.gk_proj.0.weight",
        "self_attention.gate_up.weight": "self_attn.gk_proj.1.weight",
        "self_attention.gate_up.bias": "self_attn.gk_proj.1.bias",
        "self_attention.out_norm.weight": "self_attn.g_norm.weight",
        "self_attention.q_norm.weight": "self_attn.q_norm.weight",
        "self_attention.k_norm.weight": "self_attn.k_norm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    for name, tensor in state.items():
        if not name.startswith("decoder.layers."):
            continue
        i, rest = name[len("decoder.layers.") :].split(".", 1)
        to = f"model.layers.{i}."
        if rest in renamed:
            out[to + renamed[rest]] = tensor
        elif rest == "mlp.linear_fc1.weight":
            out[to + "mlp.gate_proj.weight"], out[to + "mlp.up_proj.weight"] = tensor.chunk(2)
        else:
            heads = tensor.unflatten(0, (model.num_kv_heads, -1, model.head_dim))
            kind = rest.rsplit(".", 1)[1]
            for part, piece in (("q", heads[:, :-2]), ("k", heads[:, -2]), ("v", heads[:, -1])):
                out[f"{to}self_attn.{part}_proj.{kind}"] = piece.reshape(-1, *tensor.shape[1:])
    return out
