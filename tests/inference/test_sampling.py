"""The distribution that tokens are drawn from, against its definition token by token."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from sbtrain.inference.sampling import Sampler, Sampling

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0, 2.9])


def by_hand(*, temperature: float, top_k: int, top_p: float) -> list[float]:
    weights = {i: math.exp(x / temperature) for i, x in enumerate(LOGITS.tolist())}
    order = sorted(weights, key=weights.get, reverse=True)
    kept = order[:top_k] if top_k else order
    total, reached, chosen = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if reached < top_p:
            chosen.append(i)
            reached += weights[i] / total
    norm = sum(weights[i] for i in chosen)
    return [weights[i] / norm if i in chosen else 0.0 for i in range(len(LOGITS))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.5), (1.0, 4, 0.8), (1.0, 99, 0.01)],
)
def test_distribution(temperature, top_k, top_p):
    sampler = Sampler(Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    expected = by_hand(temperature=temperature, top_k=top_k, top_p=top_p)
    assert sampler.distribution(LOGITS).tolist() == pytest.approx(expected, abs=1e-6)


def test_draws_follow_the_distribution():
    sampler = Sampler(Sampling(temperature=1.0, top_k=3))
    counts = Counter(sampler.choose(LOGITS.bfloat16()) for _ in range(3000))
    expected = sampler.distribution(LOGITS.bfloat16().float())
    assert set(counts) == {1, 3, 5}
    assert all(abs(counts[i] / 3000 - expected[i]) < 0.04 for i in counts)


def test_greedy_ignores_the_rest():
    assert Sampler(Sampling(temperature=0, top_k=2, top_p=0.1)).choose(LOGITS) == 1


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_impossible_values_are_refused(values, key):
    with pytest.raises(ValueError, match=f"^{key}="):
        Sampling(**values)
