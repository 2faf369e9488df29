"""A random Llama model written as GGUF the way llama.cpp does comes back with the same weights, logits and text."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sbtrain.convert.gguf import convert_gguf, unpermute_rotary

TEXT = "the other 2024 naïve 你好\n\n  🙂"
HEADS, KV_HEADS, LAYERS = 4, 2, 2


def byte_characters():
    """GPT-2's character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


TOKENS = ["<|endoftext|>", "<|im_end|>", *byte_characters(), "th", "the", "20", "[x]"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        # Large enough that attention is far from uniform, and exact in bf16. (The model itself stays fp32: casting it
        # back and forth would round the frequencies of the rotary embedding.)
        spread = torch.rand_like(parameter) + 0.5 if name.endswith("norm.weight") else parameter * 10
        parameter.data = spread.to(torch.bfloat16).float()
    return model.eval()


def permuted(weight, num_heads):
    """llama.cpp's order of q and k rows: row 2i of a head is its row i, row 2i+1 its row i + half."""
    head_dim = weight.shape[0] // num_heads
    rows = [h * head_dim + i // 2 + (i % 2) * head_dim // 2 for h in range(num_heads) for i in range(head_dim)]
    return weight[rows]


def write_gguf(path, model, *, pre="smollm", architecture="llama", skip=None, quantize=None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 3) + [4])
    writer.add_token_merges(["t h", "th e", "2 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, parameter in model.named_parameters():
        name, array = _gguf_tensor(name.removeprefix("model."), parameter.detach().numpy())
        if name == skip:
            continue
        if quantize and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_tensor(name, array):
    top = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    if name in top:
        return top[name], array
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    if part == "self_attn.q_proj":
        array = permuted(array, HEADS)
    if part == "self_attn.k_proj":
        array = permuted(array, KV_HEADS)
    return f"blk.{layer}.{NAMES[part]}.weight", np.ascontiguousarray(array)


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_weights_and_logits_come_back_exactly(tmp_path, out, model):
    convert_gguf(write_gguf(tmp_path / "m.gguf", model), out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(len(TOKENS), (1, 20))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert loaded.config.rms_norm_eps == 1e-5 and loaded.config.eos_token_id == 1


def test_quantized_weights_are_dequantized(tmp_path, out, model):
    convert_gguf(write_gguf(tmp_path / "m.gguf", model, quantize=gguf.GGMLQuantizationType.Q8_0), out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        error = (loaded.get_parameter(name) - parameter).norm() / parameter.norm()
        assert error < 0.01, name


def test_unpermute_is_the_inverse():
    weight = np.arange(2 * 8 * 3.0).reshape(16, 3)
    assert (unpermute_rotary(permuted(weight, 2), num_heads=2) == weight).all()
    assert not (permuted(weight, 2) == weight).all()


def test_tokenizer_round_trip(tmp_path, out, model):
    convert_gguf(write_gguf(tmp_path / "m.gguf", model), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert ids[0] == TOKENS.index("the")
    assert TOKENS.index("20") not in ids, "smollm splits every digit"
    assert tokenizer.eos_token_id == 1 and tokenizer.encode("a<|im_end|>")[-1] == 1
    assert tokenizer.encode("[x]") == [len(TOKENS) - 1]
    assert tokenizer.decode([1, len(TOKENS) - 1], skip_special_tokens=True) == "[x]"


def test_gpt2_split_keeps_digits_together(tmp_path, out, model):
    convert_gguf(write_gguf(tmp_path / "m.gguf", model, pre="gpt-2"), out)
    assert TOKENS.index("20") in AutoTokenizer.from_pretrained(out).encode(TEXT)


def test_bad_files_are_one_line_errors(tmp_path, out, model):
    good = write_gguf(tmp_path / "good.gguf", model)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(good.read_bytes()[:-5000])
    header = tmp_path / "header.gguf"
    header.write_bytes(good.read_bytes()[:300])
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"not a model" * 100)
    cases = [
        (tmp_path / "none.gguf", "is missing"),
        (cut, "not a complete GGUF file"),
        (header, "not a complete GGUF file"),
        (noise, "not a complete GGUF file"),
        (write_gguf(tmp_path / "q.gguf", model, architecture="qwen2"), "architecture 'qwen2' is not supported"),
        (write_gguf(tmp_path / "p.gguf", model, pre="odd"), "tokenizer gpt2/odd is not supported"),
        (write_gguf(tmp_path / "s.gguf", model, skip="blk.1.ffn_up.weight"), r"lacks model\.layers\.1\.mlp\.up_proj"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            convert_gguf(path, out)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not list(out.iterdir()), path
