"""What a rank of a layout should hold of a global tensor, written from the naming contract alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sbtrain.config.model_schema import Gate
from sbtrain.config.pattern import parse_pattern

_ROWS = (
    "word_embeddings.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "gate_up.weight",
    "gate_up.bias",
    "gate.weight",
    "gate.bias",
    "output_layer.weight",
)
_EXPERTS = ("experts.linear_fc1", "experts.linear_fc2")
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def local_shard(
    name: str,
    whole: Tensor,
    *,
    tp_rank: int,
    tp: int,
    ep_rank: int = 0,
    ep: int = 1,
    norms_before_projection: bool = False,
) -> Tensor:
    """The shard of a global tensor under one of our parameter names: experts by ep, all else by tp.

    norms_before_projection: those of pairs are then cut like the output projection's columns.
    """
    if name.endswith(_EXPERTS):
        return whole.chunk(ep)[ep_rank]
    if name.endswith("linear_fc1.weight"):
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(tp)[tp_rank], up.chunk(tp)[tp_rank]])
    if name.endswith(_ROWS) or ("merge_norms" in name and norms_before_projection):
        return whole.chunk(tp)[tp_rank]
    return whole.chunk(tp, dim=1)[tp_rank] if name.endswith(_COLUMNS) else whole


def global_state(model, *, seed: int = 0, dtype=torch.float32) -> dict[str, Tensor]:
    """Random weights of a small model under our global names, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head, kv = model.hidden_size, model.head_dim, model.num_kv_heads
    rows, norm = (model.num_heads + 2 * kv) * head, hidden
    shared = model.pair.shared_projections
    if model.pair.norms_before_projection:
        norm = model.num_heads * head

    def random(*shape, scale=0.15, shift=0.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    state = {"embedding.word_embeddings.weight": random(model.padded_vocab_size, hidden, scale=0.5)}

    def projections(prefix: str):
        state[prefix + "linear_qkv.weight"] = random(rows, hidden)
        if model.qkv_bias:
            state[prefix + "linear_qkv.bias"] = random(rows)
        state[prefix + "linear_proj.weight"] = random(hidden, model.num_heads * head)

    def core(prefix: str, symbol: str):
        if symbol == "L":
            if model.gla.gate is Gate.low_rank:
                state[prefix + "gate_down.weight"] = random(model.gla.gate_rank, hidden)
                state[prefix + "gate_up.weight"] = random(kv * head, model.gla.gate_rank, scale=1)
                state[prefix + "gate_up.bias"] = random(kv * head)
            elif model.gla.gate is Gate.full_rank:
                state[prefix + "gate.weight"] = random(kv * head, hidden, scale=0.5)
                state[prefix + "gate.bias"] = random(kv * head)
            state[prefix + "out_norm.weight"] = random(head, shift=1)
        elif model.qk_norm:
            state[prefix + "q_norm.weight"] = random(head, shift=1)
            state[prefix + "k_norm.weight"] = random(head, shift=1)

    def ffn(prefix: str, moe: bool):
        for name, shape in _ffn_shapes(model, moe).items():
            state[prefix + name] = random(*shape)

    if model.meta.num_tokens:
        state["embedding.meta_tokens"] = random(model.meta.num_tokens, hidden, scale=0.5)
    for i, kind in enumerate(parse_pattern(model.pattern, model.num_layers)):
        mixer = f"decoder.layers.{i}.self_attention."
        state[f"decoder.layers.{i}.input_layernorm.weight"] = random(hidden, shift=1)
        if len(kind.mixers) == 1:
            projections(mixer)
            core(mixer, kind.mixers[0])
        else:
            if shared:
                projections(mixer)
            for symbol in kind.mixers:
                if not shared:
                    projections(f"{mixer}branches.{symbol}.")
                core(f"{mixer}branches.{symbol}.", symbol)
                state[f"{mixer}merge_norms.{symbol}.weight"] = random(norm, shift=1)
        state[f"decoder.layers.{i}.pre_mlp_layernorm.weight"] = random(hidden, shift=1)
        ffn(f"decoder.layers.{i}.mlp.", kind.moe)
    state["decoder.final_layernorm.weight"] = random(hidden, shift=1)
    if not model.tie_embeddings:
        state["output_layer.weight"] = random(model.padded_vocab_size, hidden)
    return state


def _ffn_shapes(model, moe: bool) -> dict[str, tuple[int, ...]]:
    hidden, num = model.hidden_size, model.moe.num_experts
    if not moe:
        return {"linear_fc1.weight": (2 * model.ffn_size, hidden), "linear_fc2.weight": (hidden, model.ffn_size)}
    width = model.moe.expert_ffn_size or model.ffn_size
    shapes = {"router.weight": (num, hidden)}
    shapes |= {"experts.linear_fc1": (num, 2 * width, hidden), "experts.linear_fc2": (num, hidden, width)}
    side = model.moe.num_shared_experts * width
    if side:
        shapes |= {"shared_experts.linear_fc1.weight": (2 * side, hidden)}
        shapes |= {"shared_experts.linear_fc2.weight": (hidden, side)}
    return shapes


def hf_state(state: dict[str, Tensor], model) -> dict[str, Tensor]:
    """Our global tensors under the source family's names (see plain_model)."""
    out = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"][: model.vocab_size],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
    }
    if "output_layer.weight" in state:
        out["lm_head.weight"] = state["output_layer.weight"][: model.vocab_size]
    if "embedding.meta_tokens" in state:
        out["model.meta_tokens"] = state["embedding.meta_tokens"]
    renamed = {
        "input_layernorm.weight": "input_layernorm.weight",
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
        elif rest.startswith("mlp."):
            out.update({f"{to}mlp.{theirs}": piece for theirs, piece in _hf_experts(rest[len("mlp.") :], tensor)})
        else:
            mixer = _hf_mixer(rest.removeprefix("self_attention."), tensor, model)
            out.update({f"{to}self_attn.{theirs}": piece for theirs, piece in mixer.items()})
    return out


def _hf_experts(name: str, tensor: Tensor):
    """(name, tensor) of the parts of a mixture: every expert by itself."""
    if name.startswith("router."):
        yield name, tensor
    elif name.startswith("shared_experts."):
        yield from _hf_expert("shared_expert.", name, tensor)
    else:
        for j, expert in enumerate(tensor):
            yield from _hf_expert(f"experts.{j}.", name, expert)


def _hf_expert(to: str, name: str, tensor: Tensor):
    if "linear_fc2" in name:
        yield f"{to}down_proj.weight", tensor
    else:
        yield from zip((f"{to}gate_proj.weight", f"{to}up_proj.weight"), tensor.chunk(2))


_BRANCHES = {"L": "la_", "S": "swa_", "F": "fa_"}


def _hf_mixer(name: str, tensor: Tensor, model) -> dict[str, Tensor]:
    """One tensor of a mixer: of a branch of a pair, what both have is told apart by la_, swa_ and fa_."""
    branch = ""
    if name.startswith("branches."):
        _, symbol, name = name.split(".", 2)
        branch = _BRANCHES[symbol]
    if name.startswith("merge_norms."):
        return {f"{_BRANCHES[name.split('.')[1]]}merge_norm.weight": tensor}
    renamed = {
        "linear_proj.weight": f"{branch}o_proj.weight",
        "gate_down.weight": "gk_proj.0.weight",
        "gate_up.weight": "gk_proj.1.weight",
        "gate_up.bias": "gk_proj.1.bias",
        "gate.weight": "gk_proj.weight",
        "gate.bias": "gk_proj.bias",
        "out_norm.weight": "g_norm.weight",
        "q_norm.weight": f"{branch}q_norm.weight",
        "k_norm.weight": f"{branch}k_norm.weight",
    }
    if name in renamed:
        return {renamed[name]: tensor}
    heads = tensor.unflatten(0, (model.num_kv_heads, -1, model.head_dim))
    parts = {"q": heads[:, :-2], "k": heads[:, -2], "v": heads[:, -1]}
    kind = name.rsplit(".", 1)[1]
    return {f"{branch}{part}_proj.{kind}": piece.reshape(-1, *tensor.shape[1:]) for part, piece in parts.items()}
