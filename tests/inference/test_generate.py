"""Prefill and decode: step by step equals all at once equals plain torch; memory is constant; what is generated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MetaConfig, MetaPositions, MoEConfig, PairConfig
from sbtrain.inference.generate import Speed, advance, fork, generate_ids, generate_text, prefill
from sbtrain.inference.sampling import Sampling
from sbtrain.model.cache import Cache
from tiny_model import EOS, MODEL, build, exact_logits, loaded_model, parallel_logits

PROMPT, TOTAL = 23, 40
"""The windows below are shorter than the prompt, between the two, and longer than all."""

SPLITS = {
    "one_prefill": [PROMPT] + [1] * (TOTAL - PROMPT),
    "chunks": [11, 1, 2, 9] + [1] * (TOTAL - PROMPT),
    "decode_only": [1] * TOTAL,
    "chunks_after_decoding": [5, 1, 1, 13, 1, 19],
}


@pytest.fixture
def mesh():
    with Mesh.build(Layout()) as mesh:
        yield mesh


def storage_bytes(cache: Cache, kinds: str, pattern: str) -> int:
    """Memory that the layers of the given kinds hold on to, views counted with all that they keep alive."""
    layers = [layer for i, layer in cache.layers.items() if pattern[i % len(pattern)] in kinds]
    tensors = [t for layer in layers for t in (layer.state, layer.key, layer.value) if t is not None]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("pieces", SPLITS)
@pytest.mark.parametrize(
    ("pattern", "window"), [("LS", 1), ("LS", 7), ("LS", 30), ("LS", 64), ("FS", 7), ("FS", 64), ("LF", 7)]
)
def test_pieces_equal_the_whole_and_plain_torch(mesh, pattern, window, pieces):
    about = dict(pattern=pattern, window=window, qk_norm=pattern == "FS", tie_embeddings=pattern == "LF")
    check_pieces(mesh, replace(MODEL, **about), pieces)


def check_pieces(mesh, config, pieces: str) -> None:
    model, tokens = build(config, mesh), torch.randint(config.vocab_size, (TOTAL,))
    cache = Cache()
    stepped = torch.cat([advance(model, piece, cache, num_logits=None) for piece in tokens.split(SPLITS[pieces])])
    assert cache.num_tokens == TOTAL
    torch.testing.assert_close(stepped, parallel_logits(model, tokens), atol=3e-5, rtol=0)
    torch.testing.assert_close(stepped.double(), exact_logits(config, tokens), atol=3e-5, rtol=0)


PAIRS = dict(pattern="(LS)(LF)", gla=GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied))
META = MetaConfig(num_tokens=6)
WITH_META = {
    "pairs": PAIRS,
    "shared": dict(**PAIRS, pair=PairConfig(shared_projections=True), qk_norm=True),
    "meta": dict(**PAIRS, meta=META),
    "meta_plain": dict(pattern="LSF", num_layers=3, meta=META),
    "meta_plain_unrotated": dict(pattern="LSF", num_layers=3, meta=replace(META, positions=MetaPositions.unrotated)),
    "meta_outside_of_the_state": dict(**PAIRS, meta=replace(META, in_state=False)),
}


@pytest.mark.parametrize("pieces", SPLITS)
@pytest.mark.parametrize("changes", WITH_META.values(), ids=WITH_META)
def test_pieces_of_pairs_and_meta_tokens(mesh, changes, pieces):
    check_pieces(mesh, replace(MODEL, **changes), pieces)


def test_what_is_known_of_meta_tokens_is_computed_once_and_forgotten_by_training(mesh):
    model, tokens = build(replace(MODEL, **WITH_META["meta"]), mesh), torch.randint(MODEL.vocab_size, (9,))
    first, second = prefill(model, tokens)[1], prefill(model, tokens)[1]
    assert all(first.layers[i].sinks["sink_k"] is second.layers[i].sinks["sink_k"] for i in range(MODEL.num_layers))
    before = prefill(model, tokens)[0]
    model.train()
    with torch.no_grad():
        model.embedding.meta_tokens.neg_()
    model.eval()
    after = prefill(model, tokens)[0]
    torch.testing.assert_close(after, parallel_logits(model, tokens)[-1], atol=1e-4, rtol=0)
    assert (after - before).abs().max() > 1e-2


def test_other_weights_are_seen_without_training(mesh):
    model, tokens = build(replace(MODEL, **WITH_META["meta"]), mesh), torch.randint(MODEL.vocab_size, (9,))
    prefill(model, tokens)
    with torch.no_grad():
        model.embedding.meta_tokens.neg_()
    torch.testing.assert_close(prefill(model, tokens)[0], parallel_logits(model, tokens)[-1], atol=1e-4, rtol=0)
    others = {name: 1.5 * value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    model.load_state_dict(others, strict=False)
    torch.testing.assert_close(prefill(model, tokens)[0], parallel_logits(model, tokens)[-1], atol=1e-4, rtol=0)


def test_limits_of_experts_are_trainings(mesh):
    """Else pieces of a prompt would not be the prompt, nor a run its export."""
    without = MoEConfig(num_experts=4, top_k=2)
    models = [
        build(replace(MODEL, pattern="L:mS", num_layers=2, moe=replace(without, capacity_factor=factor)), mesh)
        for factor in (0.0, 0.5)
    ]
    tokens = torch.randint(MODEL.vocab_size, (TOTAL,))
    free, limited = (parallel_logits(model, tokens) for model in models)
    assert torch.equal(free, limited)
    models[1].train()
    assert (parallel_logits(models[1], tokens) - free).abs().max() > 1e-3
    check_pieces(mesh, models[1].model_config, "chunks")


def test_chunked_prefill_gives_the_last_logits(mesh):
    model, tokens = build(MODEL, mesh), torch.randint(MODEL.vocab_size, (TOTAL,))
    expected = parallel_logits(model, tokens)[-1]
    for chunk_tokens in (1, 7, 39, 40, 4096):
        logits, cache = prefill(model, tokens, chunk_tokens=chunk_tokens)
        assert logits.shape == (MODEL.vocab_size,) and cache.num_tokens == TOTAL
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pattern", ["LS", "LF"])
def test_memory_is_constant_but_for_full_attention(mesh, pattern):
    config = replace(MODEL, pattern=pattern)
    model = build(config, mesh)
    _, cache = prefill(model, torch.randint(config.vocab_size, (60,)), chunk_tokens=25)
    sizes = {kinds: [storage_bytes(cache, kinds, pattern)] for kinds in ("LS", "F")}
    for _ in range(30):
        advance(model, torch.randint(config.vocab_size, (1,)), cache)
        for kinds, history in sizes.items():
            history.append(storage_bytes(cache, kinds, pattern))
    assert len(set(sizes["LS"][1:])) == 1 and sizes["LS"][0] <= sizes["LS"][1]
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * 4
    state_bytes = config.num_kv_heads * config.head_dim**2 * 4
    assert sizes["LS"][1] == 2 * state_bytes + (2 * config.window * kv_bytes if pattern == "LS" else 0)
    assert sizes["F"] == [2 * (60 + step) * kv_bytes if pattern == "LF" else 0 for step in range(31)]


def test_a_fork_does_not_disturb_the_original(mesh):
    config = replace(MODEL, pattern="LSFS")
    model, tokens = build(config, mesh), torch.randint(config.vocab_size, (30,))
    _, cache = prefill(model, tokens[:20])
    advance(model, torch.randint(config.vocab_size, (9,)), fork(cache))
    rest = advance(model, tokens[20:], cache, num_logits=None)
    torch.testing.assert_close(rest, parallel_logits(model, tokens)[20:], atol=1e-4, rtol=0)


def test_greedy_is_the_best_token_at_every_step(mesh):
    model, prompt = build(MODEL, mesh), torch.randint(MODEL.vocab_size, (PROMPT,)).tolist()
    speed = Speed()
    written = list(generate_ids(model, prompt, max_new_tokens=9, chunk_tokens=8, speed=speed))
    best = exact_logits(MODEL, torch.tensor(prompt + written))[PROMPT - 1 : -1].argmax(-1)
    assert written == best.tolist()
    assert (speed.num_prompt_tokens, speed.num_new_tokens) == (PROMPT, 9)
    assert speed.prefill_tokens_per_s > 0 and speed.decode_tokens_per_s > 0 and "generated 9 tokens" in str(speed)


def test_sampling_repeats_with_its_seed(mesh):
    model = build(MODEL, mesh)
    seed_1, again, seed_2 = (
        list(generate_ids(model, [1, 2, 3], max_new_tokens=20, sampling=Sampling(temperature=1.5, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert seed_1 == again != seed_2
    only_one = Sampling(temperature=1.5, top_k=1)
    assert list(generate_ids(model, [1, 2], max_new_tokens=6, sampling=only_one)) == list(
        generate_ids(model, [1, 2], max_new_tokens=6)
    )


def test_a_stop_id_ends_the_text_and_is_left_out(mesh):
    model = build(MODEL, mesh)
    written = list(generate_ids(model, [5, 6, 7], max_new_tokens=12))
    stop = written[4]
    expected = written[: written.index(stop)]
    assert list(generate_ids(model, [5, 6, 7], max_new_tokens=12, stop_ids=frozenset([stop, EOS]))) == expected


def test_text_pieces_are_the_text(mesh, tmp_path):
    loaded = loaded_model(tmp_path, mesh)
    options = dict(max_new_tokens=40, sampling=Sampling(temperature=1.0, seed=3))
    pieces = list(generate_text(loaded, "héllo", **options))
    (prompt_ids,) = loaded.tokenizer.encode_batch(["héllo"])
    ids = list(generate_ids(loaded.model, prompt_ids, stop_ids=loaded.stop_ids, **options))
    assert len(pieces) > 3 and "".join(pieces) == loaded.tokenizer.decode(ids, skip_special=True)
    with pytest.raises(ValueError, match="prompt= is empty"):
        next(generate_text(loaded, "", max_new_tokens=1))
