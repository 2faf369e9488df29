"""The converted model against plain torch in float64; documents that do not see each other; which tokens are scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor

from logits_case import as_row, fill_from, fill_random, forward_rows, logits_on, whole_logits
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.schedule import evaluate_rows
from parallel.sequence.shard import IGNORE, Documents, positions_of
from plain_model import plain_logits
from sbtrain.config.hf_shape import read_shape
from sbtrain.config.model_schema import (
    FeatureMap,
    Gate,
    GLAConfig,
    MergePlace,
    MetaConfig,
    MetaPositions,
    ModelConfig,
    PairConfig,
    RopeScaling,
)
from sbtrain.config.schema import Precision
from sbtrain.model.build import build_model, global_parameters
from sharding import global_state, hf_state

TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
META = MetaConfig(num_tokens=5)
SHARED = PairConfig(shared_projections=True)
BEFORE = PairConfig(norm_place=MergePlace.before_projection)
BASE = ModelConfig(
    pattern="LS", vocab_size=90, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
    norm_eps=1e-5, rope_theta=1e4, max_positions=256, tie_embeddings=False, qkv_bias=False, qk_norm=False, window=7,
    gla=GLAConfig(gate_rank=4), vocab_multiple=32,
)  # fmt: skip
MODELS = {
    "LS_bias": replace(BASE, qkv_bias=True),
    "LS_tied": replace(BASE, tie_embeddings=True),
    "LSF_qk_norm": replace(BASE, pattern="LSF", num_layers=3, qk_norm=True),
    "LSF_bias_tied_odd_heads": replace(
        BASE, pattern="LSF", num_layers=6, num_heads=9, num_kv_heads=3, qkv_bias=True, tie_embeddings=True
    ),
    "SL_wide_heads_long_window": replace(BASE, pattern="SL", head_dim=12, window=500),
    "L_slow_gate": replace(BASE, pattern="L", gla=GLAConfig(gate_rank=3, gate_normalizer=64.0)),
    "F_llama3": replace(BASE, pattern="F", rope_scaling=RopeScaling(original_max_positions=16)),
    "S_self_only": replace(BASE, pattern="S", window=1),
    "LF_full_rank_gate": replace(BASE, pattern="LF", gla=GLAConfig(gate=Gate.full_rank, gate_normalizer=4.0)),
    "L_sigmoid": replace(BASE, pattern="L", gla=replace(BASE.gla, feature_map=FeatureMap.sigmoid)),
    "LS_tied_gate": replace(BASE, gla=TIED),
    "L_tied_gate_above_a_bound": replace(BASE, pattern="L", gla=replace(TIED, lower_bound=0.3)),
    "pair_LS": replace(BASE, pattern="(LS)", gla=TIED, qkv_bias=True),
    "pair_LF_qk_norm_low_rank": replace(BASE, pattern="(LF)", qk_norm=True),
    "pairs_among_plain_layers": replace(BASE, pattern="(LS)L(LF)S", gla=TIED, num_heads=9, num_kv_heads=3),
    "pair_LS_shared": replace(BASE, pattern="(LS)", gla=TIED, qkv_bias=True, pair=SHARED),
    "pairs_shared_qk_norm_low_rank": replace(BASE, pattern="(LS)(LF)", qk_norm=True, pair=SHARED),
    "pairs_normed_before_own_projections": replace(BASE, pattern="(LS)(LF)", gla=TIED, pair=BEFORE, head_dim=12),
    "L_rotated": replace(BASE, pattern="L", gla=replace(TIED, rope=True)),
    "meta_pairs_rotated": replace(BASE, pattern="(LS)", meta=META, gla=GLAConfig(gate_rank=4, rope=True), pair=BEFORE),
    "meta_LSF": replace(BASE, pattern="LSFS", meta=META),
    "meta_pairs": replace(BASE, pattern="(LS)(LF)", gla=TIED, meta=META),
    "meta_pairs_shared": replace(BASE, pattern="(LS)(LF)", gla=TIED, meta=META, pair=SHARED),
    "meta_unrotated": replace(BASE, pattern="(LS)(LF)", meta=replace(META, positions=MetaPositions.unrotated)),
    "meta_outside_of_the_state": replace(BASE, pattern="(LS)L", gla=TIED, meta=replace(META, in_state=False)),
    "meta_one": replace(BASE, meta=MetaConfig(num_tokens=1)),
}
BOUNDS = torch.tensor([0, 1, 24, 24, 61, 80], dtype=torch.int32)  # odd lengths, one token alone, an empty document


def packed_tokens(vocab_size: int = 90) -> Tensor:
    return torch.randint(0, vocab_size, (int(BOUNDS[-1]),), generator=torch.Generator().manual_seed(5))


def check_close(logits: Tensor, expected: Tensor) -> None:
    """Within fp32's reach of float64, as a whole and in every token."""
    assert logits.shape == expected.shape
    distance = (logits.double() - expected).norm(dim=-1)
    assert (distance <= 1e-5 * expected.norm(dim=-1)).all(), (distance / expected.norm(dim=-1)).max()


@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_plain_torch(name):
    model, tokens = MODELS[name], packed_tokens()
    _, (logits,) = logits_on(0, Layout(), model, [as_row(tokens, BOUNDS)])
    state = hf_state(global_state(model, dtype=torch.float64), model)
    check_close(logits, plain_logits(state, model, tokens, BOUNDS))


@pytest.mark.parametrize("name", ["meta_pairs", "meta_pairs_shared", "meta_LSF", "L_tied_gate_above_a_bound"])
def test_gradients_equal_plain_torch(name):
    """Of every parameter, the meta tokens' among them: all documents add up."""
    model, tokens = MODELS[name], packed_tokens()
    weights = torch.randn(len(tokens), model.vocab_size, generator=torch.Generator().manual_seed(2))
    with Mesh.build(Layout()) as mesh:
        built = build_model(model, mesh, precision=Precision.fp32, seq_len=80)
        fill_random(built, model, mesh)
        (built(tokens, Documents(BOUNDS, positions_of(BOUNDS))) * weights).sum().backward()
        grads = {parameter: p.grad for parameter, p in global_parameters(built).items()}
    state = {name: x.requires_grad_() for name, x in global_state(model, dtype=torch.float64).items()}
    (plain_logits(hf_state(state, model), model, tokens, BOUNDS) * weights).sum().backward()
    for parameter, grad in grads.items():
        expected = state[parameter].grad
        assert float((grad - expected).norm()) <= 2e-5 * float(expected.norm()), parameter


CONVERTED = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, "LS"),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, "LSF"),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, "LSF"),
}


@pytest.mark.parametrize("family", CONVERTED)
def test_a_converted_checkpoint_equals_plain_torch_on_the_teachers_own_tensors(tmp_path, family):
    config_class, model_class, pattern = CONVERTED[family]
    extra = {"head_dim": 10} if family == "qwen3" else {}
    teacher = model_class(
        config_class(
            vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=family == "llama", **extra,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter_name, parameter in teacher.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
    teacher.save_pretrained(tmp_path)
    model, tokens = ModelConfig(pattern=pattern, window=7, **read_shape(tmp_path)), packed_tokens()
    with Mesh.build(Layout()) as mesh:
        built = build_model(model, mesh, precision=Precision.fp32, seq_len=len(tokens))
        fill_from(built, model, mesh, str(tmp_path))
        (logits,) = forward_rows(built, mesh, [as_row(tokens, BOUNDS)])
        ours = hf_state({name: p.detach() for name, p in global_parameters(built).items()}, model)
    added = {name: tensor for name, tensor in ours.items() if "gk_proj" in name or "g_norm" in name}
    assert len(added) == 4 * (model.num_layers // len(pattern))
    state = {name: tensor.double() for name, tensor in {**teacher.state_dict(), **added}.items()}
    check_close(logits, plain_logits(state, model, tokens, BOUNDS))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("pattern", ["F", "S", "L", "LS"])
@pytest.mark.parametrize("meta", [MetaConfig(), META], ids=["", "meta"])
def test_changing_one_document_changes_no_logits_of_another(run_ranks, meta, pattern, num_ranks):
    """Under sp the document lies on both ranks: the shards meet at token 40, inside the changed one. Running sums of
    decays begin with a chunk, not with a document: their rounding may show in the last digit."""
    model = replace(BASE, pattern=pattern, num_layers=2, window=30, meta=meta)
    tokens = packed_tokens()
    start, stop = int(BOUNDS[3]), int(BOUNDS[4])
    changed = torch.cat([tokens[:start], (tokens[start:stop] + 1) % 90, tokens[stop:]])
    rows = [as_row(tokens, BOUNDS), as_row(changed, BOUNDS)]
    before, after = whole_logits(run_ranks(num_ranks)(logits_on, Layout(sp=num_ranks), model, rows))
    inside = torch.zeros(len(tokens), dtype=torch.bool)
    inside[start:stop] = True
    assert (before[~inside] - after[~inside]).abs().max() <= 5e-6
    assert (before[inside] - after[inside]).abs().amax(-1).min() > 1e-2, "every token of the changed one noticed"


@pytest.mark.parametrize("pattern", ["F", "S", "L"])
@pytest.mark.parametrize("meta", [MetaConfig(), META], ids=["", "meta"])
def test_a_document_does_not_know_where_in_the_row_it_lies(meta, pattern):
    """Positions and states begin anew: packed or alone, a document has the same logits."""
    model, tokens = replace(BASE, pattern=pattern, num_layers=2, meta=meta), packed_tokens()
    document = tokens[24:61]
    with Mesh.build(Layout()) as mesh:
        built = build_model(model, mesh, precision=Precision.fp32, seq_len=80)
        fill_random(built, model, mesh)
        (packed,) = forward_rows(built, mesh, [as_row(tokens, BOUNDS)])
        (alone,) = forward_rows(built, mesh, [as_row(document)])
    torch.testing.assert_close(packed[24:61], alone, rtol=1e-5, atol=1e-5)


def _losses(model: ModelConfig, labels: Tensor, spoil_padding: float = 0.0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of every token, the logits, and the gradients of the summed loss, with `spoil_padding` in the padding."""
    tokens, documents = packed_tokens(), Documents(BOUNDS, positions_of(BOUNDS))
    with Mesh.build(Layout()) as mesh:
        built = build_model(model, mesh, precision=Precision.fp32, seq_len=80)
        fill_random(built, model, mesh)
        with torch.no_grad():
            built.head_weight()[model.vocab_size :] = spoil_padding
            logits = built(tokens, documents)
        losses = built(tokens, documents, labels)
        losses.sum().backward()
        return losses.detach(), logits, {name: p.grad for name, p in global_parameters(built).items()}


def test_ignored_tokens_are_not_scored():
    labels = as_row(packed_tokens(), BOUNDS).labels
    labels[torch.arange(0, 80, 3)] = IGNORE
    losses, logits, grads = _losses(BASE, labels)
    scored = labels != IGNORE
    expected = torch.nn.functional.cross_entropy(logits.double()[scored], labels[scored], reduction="none")
    torch.testing.assert_close(losses[scored].double(), expected, rtol=1e-5, atol=1e-5)
    assert not losses[~scored].any()
    _, _, none = _losses(BASE, torch.full_like(labels, IGNORE))
    assert not any(grad.any() for grad in none.values()) and any(grad.any() for grad in grads.values())


def test_sums_count_scored_tokens_alone():
    """Of every row, with as many or as few scored tokens as it has; a row without any counts nothing."""
    rows = [as_row(packed_tokens(), BOUNDS) for _ in range(3)]
    rows[1].labels[10:] = IGNORE
    rows[2].labels[:] = IGNORE
    with Mesh.build(Layout()) as mesh:
        built = build_model(BASE, mesh, precision=Precision.fp32, seq_len=80)
        fill_random(built, BASE, mesh)
        logits = forward_rows(built, mesh, rows)
        sums = evaluate_rows(built, mesh, rows)
    assert [one.num_tokens for one in sums] == [76, 9, 0]
    for one, row, each in zip(sums, rows, logits):
        expected = torch.nn.functional.cross_entropy(each.double(), row.labels, ignore_index=IGNORE, reduction="sum")
        assert one.loss == pytest.approx(expected.item(), rel=1e-5)
    assert sums[2].loss == 0.0 == sums[2].mean


@pytest.mark.parametrize("tied", [False, True])
def test_padding_of_the_vocabulary_never_gets_probability(tied):
    """Whatever its rows hold: 90 tokens are padded to 96."""
    model, labels = replace(BASE, tie_embeddings=tied), as_row(packed_tokens(), BOUNDS).labels
    clean, spoiled = _losses(model, labels), _losses(model, labels, spoil_padding=1e3)
    assert clean[1].shape == (80, 90)
    assert torch.equal(clean[0], spoiled[0]) and torch.equal(clean[1], spoiled[1])
    head = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    assert not spoiled[2][head][90:].any() and spoiled[2][head][:90].any()
    for name, grad in clean[2].items():
        assert torch.equal(grad, spoiled[2][name]), name


def _losses_of_tp(rank: int, labels: Tensor, spoil_padding: float) -> Tensor:
    """The same on two tensor-parallel ranks; the padding lies on the second."""
    with Mesh.build(Layout(tp=2)) as mesh:
        built = build_model(BASE, mesh, precision=Precision.fp32, seq_len=80)
        fill_random(built, BASE, mesh)
        with torch.no_grad():
            if rank == 1:
                built.head_weight()[90 - 48 :] = spoil_padding
            return built(packed_tokens(), Documents(BOUNDS, positions_of(BOUNDS)), labels)


def test_padding_never_gets_probability_under_tp(run_ranks):
    labels = as_row(packed_tokens(), BOUNDS).labels
    whole, _, _ = _losses(BASE, labels)
    for losses in run_ranks(2)(_losses_of_tp, labels, 1e3):
        torch.testing.assert_close(losses, whole, rtol=1e-5, atol=1e-5)
