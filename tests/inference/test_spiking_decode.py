"""Models that spike read and write token by token as they do all at once; their caches hold INT8. In float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from exact_case import exact_chunks
from parallel.layout import Layout
from parallel.mesh import Mesh
from plain_model import plain_logits
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MetaConfig
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.inference.generate import advance, prefill
from sbtrain.model.cache import Cache
from sbtrain.spiking.neuron import set_share
from sharding import global_state, hf_state
from tiny_model import MODEL, parallel_logits

SPIKING = SpikingConfig(enabled=True, spike_down_proj=True)
TIED = GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied)
MODELS = {
    "LS": dict(num_layers=2),
    "FS": dict(num_layers=2, pattern="FS", window=30),
    "self_only": dict(num_layers=2, pattern="S", window=1),
    "pairs_meta": dict(num_layers=2, pattern="(LS)(LF)", gla=TIED, meta=MetaConfig(num_tokens=6)),
}
TOTAL, PIECES = 40, [23, 1, 1, 9, 1, 1, 1, 1, 1, 1]


def expected_logits(config, tokens, share: float):
    return plain_logits(hf_state(global_state(config, dtype=torch.float64), config), config, tokens, None, share)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_equal_the_whole_and_plain_torch(name, share):
    config, tokens = replace(MODEL, **MODELS[name], spiking=SPIKING), torch.randint(MODEL.vocab_size, (TOTAL,))
    with Mesh.build(Layout()) as mesh:
        model, cache = exact_chunks(config, mesh, seq_len=TOTAL)[0].eval(), Cache()
        set_share(model, share)
        stepped = torch.cat([advance(model, piece, cache, num_logits=None) for piece in tokens.split(PIECES)])
        whole = parallel_logits(model, tokens)
    expected = expected_logits(config, tokens, share)
    torch.testing.assert_close(stepped, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(whole, expected, atol=1e-8, rtol=0)


def cache_after(config, tokens, share: float = 1.0) -> Cache:
    with Mesh.build(Layout()) as mesh:
        model = exact_chunks(config, mesh, seq_len=TOTAL)[0].eval()
        set_share(model, share)
        return prefill(model, tokens, chunk_tokens=7)[1]


def test_caches_of_windows_are_int8():
    config = replace(MODEL, pattern="SF", num_layers=2, spiking=SPIKING)
    tokens = torch.randint(MODEL.vocab_size, (TOTAL,))
    window, full = (cache_after(config, tokens).layers[i] for i in range(2))
    assert {window.key.dtype, window.value.dtype} == {torch.int8} and window.key.shape == (1, MODEL.window - 1, 2, 8)
    assert window.key_scale.shape == (1, MODEL.window - 1, 2, 1)
    assert window.key.abs().amax(-1).eq(127).all(), "the scale is that of each token and head"
    assert full.key.dtype == torch.float64 and full.key_scale is None
    on_the_way = cache_after(config, tokens, share=0.5).layers[0]
    assert on_the_way.key.dtype == torch.float64 and on_the_way.key_scale is None
    off = cache_after(replace(config, spiking=replace(SPIKING, kv_int8=False)), tokens).layers[0]
    assert off.key.dtype == torch.float64


def read_over_ranks(rank: int, config, tokens, num_read: int):
    """Logits after the prompt, and after each token behind it, of a rank that keeps the cache."""
    with Mesh.build(Layout(sp=2)) as mesh:
        model = exact_chunks(config, mesh, seq_len=TOTAL)[0].eval()
        logits, cache = prefill(model, tokens[:num_read])
        return torch.cat([logits[None], *(advance(model, token, cache) for token in tokens[num_read:].split(1))])


@pytest.mark.parametrize("name", ["LS", "pairs_meta"])
def test_prefill_over_ranks(name, run_ranks):
    config, tokens = replace(MODEL, **MODELS[name], spiking=SPIKING), torch.randint(MODEL.vocab_size, (TOTAL,))
    expected = expected_logits(config, tokens, 1.0)[30:]
    for logits in run_ranks(2)(read_over_ranks, config, tokens, 31):
        torch.testing.assert_close(logits, expected, atol=1e-8, rtol=0)
