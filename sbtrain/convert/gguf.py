"""A llama-architecture GGUF file (one file, any quantization) to a Hugging Face folder with bf16 weights.

Writes config.json (LlamaForCausalLM), model.safetensors, tokenizer.json and tokenizer_config.json. Weights are
dequantized by `gguf`; the tokenizer is written from the file's own vocabulary and merges. Key names of GGUF:
github.com/ggml-org/ggml docs/gguf.md; the rotary row order that is undone here: llama.cpp convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_CONTROL, _USER_DEFINED = 3, 4
"""GGUF token types that are added tokens: control tokens are special, user-defined ones are ordinary text."""


def convert_gguf(path: str | Path, out: str | Path) -> None:
    """Convert one GGUF file into the existing, empty folder `out`.

    Raises ValueError for a file that is not GGUF, is truncated, or holds another architecture or tokenizer.
    """
    path, out = Path(path), Path(out)
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(path, fields, has_head=any(tensor.name == "output.weight" for tensor in reader.tensors))
    texts = {
        "config.json": config,
        "tokenizer.json": _tokenizer(path, fields),
        "tokenizer_config.json": _tokenizer_config(fields),
    }
    weights = dict(_weights(path, reader, config))
    _check_complete(path, weights, config)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in texts.items():
        (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def unpermute_rotary(weight: np.ndarray, *, num_heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's order (pairs interleaved) back to Hugging Face's (two halves). [H*hd, D]."""
    rows = weight.shape[0]
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    if not path.is_file():
        raise ValueError(f"{path} is missing; download the GGUF file first")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a complete GGUF file ({reason}); download it again") from error


def _config(path: Path, fields: dict[str, Any], *, has_head: bool) -> dict[str, Any]:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; only llama GGUF files convert")
    if fields.get("llama.rope.scaling.type", "none") != "none" or "llama.expert_count" in fields:
        raise ValueError(f"{path}: scaled rope and experts are not supported; convert the original checkpoint instead")
    hidden, num_heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    # The file holds a float32: 1e-5 comes back as 9.999999747378752e-06.
    norm_eps = float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", num_heads),
        "head_dim": fields.get("llama.rope.dimension_count", hidden // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": norm_eps,
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not has_head,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def _weights(path: Path, reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        name = _hf_name(path, tensor.name)
        array = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            array = unpermute_rotary(array, num_heads=config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            array = unpermute_rotary(array, num_heads=config["num_key_value_heads"])
        yield name, torch.from_numpy(np.require(array, requirements=["C", "W"])).to(torch.bfloat16)


def _hf_name(path: Path, name: str) -> str:
    if name in _TENSORS:
        return _TENSORS[name]
    block, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if block != "blk" or part not in _LAYER_TENSORS:
        raise ValueError(f"{path}: tensor {name} has no place in a plain llama model; convert the original checkpoint")
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}"


def _check_complete(path: Path, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    needed = {"model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(config["num_hidden_layers"]):
        needed |= {f"model.layers.{layer}.{part}" for part in _LAYER_TENSORS.values()}
    if missing := sorted(needed - weights.keys()):
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more tensors; download it again")


def _tokenizer(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE vocabulary."""
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _SPLITS:
        known = ", ".join(_SPLITS)
        raise ValueError(f"{path}: tokenizer {model}/{pre} is not supported (byte-level BPE with splits of {known})")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_SPLITS[pre], byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


_SPLITS = {"gpt-2": [], "smollm": [{"type": "Digits", "individual_digits": True}]}
"""What runs before the byte-level split of GPT-2, by the name that GGUF gives to the pre-tokenizer."""


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None:
            config[f"{ours}_token"] = tokens[index]
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    config["model_max_length"] = fields["llama.context_length"]
    return config
