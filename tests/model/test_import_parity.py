"""Import parity: the imported, unconverted model (pattern F) gives the logits of transformers, on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from logits_case import as_row, logits_on, whole_logits
from parallel.layout import Layout
from sbtrain.config.hf_shape import read_shape
from sbtrain.config.load import load
from sbtrain.config.schema import ModelConfig

SMOLLM2 = Path(__file__).resolve().parents[2] / ".cache/demo/smollm2-135m"
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 10, "tie_word_embeddings": True}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "llama3": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rope_parameters": LLAMA3}),
}
LAYOUTS = {
    "one": (1, Layout()),
    "tp2": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "sp2": (2, Layout(sp=2)),
    "dp2_tp2": (4, Layout(tp=2)),
}


def config_of(folder: Path) -> ModelConfig:
    """The unconverted model; the vocabulary is padded where it can be."""
    return ModelConfig(pattern="F", vocab_multiple=24, **read_shape(folder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> (folder, rows of two documents of 61 and 35 tokens, what transformers says about each)."""

    def save(family: str):
        if family not in made:
            made[family] = _save(tmp_path_factory.mktemp(family), family)
        return made[family]

    made = {}
    return save


def _save(folder: Path, family: str):
    config_class, model_class, changes = FAMILIES[family]
    torch.manual_seed(11)
    teacher = model_class(config_class(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    teacher.save_pretrained(folder)
    documents = [torch.randint(0, 131, (length,)) for length in (61, 35)]
    with torch.no_grad():
        expected = torch.cat([teacher(document[None]).logits[0] for document in documents])
    return folder, as_row(torch.cat(documents), torch.tensor([0, 61, 96], dtype=torch.int32)), expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_equal_transformers(saved, run_ranks, family, layout):
    folder, row, expected = saved(family)
    num_ranks, ranks = LAYOUTS[layout]
    (logits,) = whole_logits(run_ranks(num_ranks)(logits_on, ranks, config_of(folder), [row], str(folder)))
    assert logits.shape == expected.shape and expected.std() > 0.3, "the comparison means something"
    assert (logits - expected).abs().max() < 1e-4


@pytest.fixture(scope="module")
def smollm2():
    """Tokens of some text, and what transformers says about them."""
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip("SmolLM2-135M is not there; run `python launch/fetch_demo.py`")
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    ids = tokenizers.Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json")).encode(text).ids
    tokens = torch.tensor(ids[:96])
    teacher = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    with torch.no_grad():
        return tokens, teacher(tokens[None]).logits[0]


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(1, Layout()), (3, Layout(tp=3)), (2, Layout(pp=2)), (2, Layout(sp=2))],
    ids=["one", "tp3", "pp2", "sp2"],
)
def test_smollm2_equals_transformers(smollm2, run_ranks, num_ranks, layout):
    tokens, expected = smollm2
    config = ModelConfig(pattern="F", **read_shape(SMOLLM2))
    results = run_ranks(num_ranks)(logits_on, layout, config, [as_row(tokens)], str(SMOLLM2))
    (logits,) = whole_logits(results)
    assert (logits - expected).abs().max() < 5e-4
    assert (logits - expected).norm() < 5e-6 * expected.norm()


def test_smollm2_cannot_be_cut_in_two_by_tp():
    with pytest.raises(ValueError, match=r"stages\.ctx_256\.layout\.tp=2 does not divide model\.num_heads=9; choose"):
        load(["recipe=demo", "dry_run=true", "stages.ctx_256.layout.tp=2"])
