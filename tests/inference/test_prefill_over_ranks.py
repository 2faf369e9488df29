"""Prefill over sequence-parallel ranks: logits, every cache and what is generated next equal one rank's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from parallel.mesh import Mesh
from sbtrain.config.schema import ModelConfig
from sbtrain.inference.generate import advance, generate_ids, prefill
from sbtrain.inference.sampling import Sampling
from sbtrain.model.cache import Cache
from tiny_model import MODEL, build

ODD_HEADS = dict(num_heads=9, num_kv_heads=3, hidden_size=36, head_dim=4)
TOLERANCE = dict(atol=2e-5, rtol=0)
NUM_GREEDY = 5

ULYSSES = SequenceAlgorithms()
OWN = SequenceAlgorithms(S=SequenceAlgorithm.halo, L=SequenceAlgorithm.lasp2)
CASES = [
    (2, ULYSSES, dict(pattern="LS", **ODD_HEADS)),
    (2, OWN, dict(pattern="LS", **ODD_HEADS)),
    (2, ULYSSES, dict(pattern="LF", qk_norm=True, tie_embeddings=True, **ODD_HEADS)),
    (2, OWN, dict(pattern="LS", window=1)),
    (3, ULYSSES, dict(pattern="LS", **ODD_HEADS)),
    (3, OWN, dict(pattern="LF", **ODD_HEADS)),
    (3, ULYSSES, dict(pattern="F", **ODD_HEADS)),
    (4, ULYSSES, dict(pattern="LS")),
    (4, OWN, dict(pattern="LS", **ODD_HEADS)),
    (4, OWN, dict(pattern="LFSS", window=30)),
]
"""sp; algorithms; the model. Its window of 7 is longer than some shards and prompts, 30 than more of them."""
LENGTHS = (1, 2, 3, 4, 5, 8, 13, 29, 48, 53)
"""Of prompts: fewer tokens than ranks, one each, odd ones, several windows."""


def prompt_of(num_tokens: int) -> Tensor:
    return torch.randint(MODEL.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))


def contents(cache: Cache) -> tuple[int, list]:
    layers = sorted(cache.layers.items())
    return cache.num_tokens, [(index, layer.state, layer.key, layer.value) for index, layer in layers]


def greedy(model, logits: Tensor, cache: Cache) -> list[int]:
    written = [int(logits.argmax())]
    while len(written) < NUM_GREEDY:
        written.append(int(advance(model, torch.tensor(written[-1:]), cache)[-1].argmax()))
    return written


def prefilled(rank: int, layout: Layout, config: ModelConfig, keep: str | int) -> list:
    """For each length logits, caches and greedy tokens; None where they are not kept."""
    with Mesh.build(layout) as mesh:
        model, found = build(config, mesh), []
        for num_tokens in LENGTHS:
            logits, cache = prefill(model, prompt_of(num_tokens), chunk_tokens=20, keep=keep)
            kept = logits is not None
            found.append((logits, contents(cache), greedy(model, logits, cache)) if kept else cache)
    return found


def check_equal(found: list, expected: list) -> None:
    for num_tokens, (logits, caches, written), (true_logits, true_caches, true_written) in zip(
        LENGTHS, found, expected, strict=True
    ):
        torch.testing.assert_close(logits, true_logits, **TOLERANCE)
        assert caches[0] == num_tokens
        torch.testing.assert_close(caches, true_caches, **TOLERANCE)
        assert written == true_written


@pytest.mark.parametrize(("sp", "algorithms", "changes"), CASES)
def test_every_rank_is_left_what_one_rank_has(run_ranks, sp, algorithms, changes):
    config = replace(MODEL, **changes)
    expected = prefilled(0, Layout(), config, "all")
    for found in run_ranks(sp)(prefilled, Layout(sp=sp, sp_algorithm=algorithms), config, "all"):
        check_equal(found, expected)


@pytest.mark.parametrize(("keep", "keeper"), [("last", 2), (0, 0), (1, 1)])
@pytest.mark.parametrize("algorithms", [ULYSSES, OWN], ids=["ulysses", "own"])
def test_one_rank_is_left_it_alone(run_ranks, algorithms, keep, keeper):
    config = replace(MODEL, pattern="LFSL", **ODD_HEADS)
    expected = prefilled(0, Layout(), config, "all")
    results = run_ranks(3)(prefilled, Layout(sp=3, sp_algorithm=algorithms), config, keep)
    check_equal(results.pop(keeper), expected)
    assert results == [[None] * len(LENGTHS)] * 2


def ids_of(rank: int, layout: Layout, sampling: Sampling) -> list[list[int]]:
    with Mesh.build(layout) as mesh:
        model = build(MODEL, mesh)
        return [
            list(generate_ids(model, prompt_of(num_tokens).tolist(), max_new_tokens=6, sampling=sampling))
            for num_tokens in (2, 23)
        ]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)], ids=["greedy", "drawn"])
def test_all_ranks_write_what_one_rank_writes(run_ranks, sampling):
    expected = ids_of(0, Layout(), sampling)
    assert run_ranks(3)(ids_of, Layout(sp=3, sp_algorithm=OWN), sampling) == [expected] * 3


def keep_nowhere(rank: int, keep: str | int) -> None:
    with Mesh.build(Layout(sp=2)) as mesh:
        prefill(build(MODEL, mesh), prompt_of(5), keep=keep)


@pytest.mark.parametrize("keep", [2, -1, "first"])
def test_a_rank_that_is_not_there(run_ranks, keep):
    with pytest.raises(ValueError, match=f"keep={keep} is not one of all, last and the sp ranks 0 to 1"):
        run_ranks(2)(keep_nowhere, keep)
