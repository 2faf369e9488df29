"""Every prefix within one sample of the weights, each source read in order, any place found at once."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sbtrain.data.blend import MAX_PERIOD, Blend

WEIGHTS = [
    [1],
    [1, 1],
    [0.7, 0.3],
    [0.25, 0.6, 0.15],
    [3, 0, 5, 7, 2],
    [0.05] * 20,
    [0.5] + [0.026] * 19,  # rounding each share by itself is off by five samples here
    [10, 9.5, 1, 1, 1, 0.5, 0.25, 0.25],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_prefix_is_within_one_sample(weights):
    num = 20_000
    source, _ = Blend(weights).assign(np.arange(num))
    counts = (source[:, None] == np.arange(len(weights))).cumsum(axis=0)
    quotas = np.arange(1, num + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - quotas).max() < 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_source_is_read_in_order_without_gaps(weights):
    source, index = Blend(weights).assign(np.arange(5000))
    for k in range(len(weights)):
        assert index[source == k].tolist() == list(range((source == k).sum()))


def test_weights_with_many_digits_are_rounded_once():
    weights = [0.123456789, 0.5, 1e-9, 0.376543]
    blend = Blend(weights)
    assert MAX_PERIOD <= blend.period <= MAX_PERIOD + len(weights)
    assert np.abs(blend.counts / blend.period - np.array(weights) / sum(weights)).max() < 1 / MAX_PERIOD
    assert blend.counts[2] == 1


def test_place_is_found_at_once_and_fast():
    blend = Blend([0.3, 0.7, 0.11])
    start = time.process_time()
    whole = blend.assign(np.arange(10**7))
    assert time.process_time() - start < 2
    middle = blend.assign(np.arange(9_000_000, 9_000_100))
    assert (middle[0] == whole[0][9_000_000:9_000_100]).all()
    assert (middle[1] == whole[1][9_000_000:9_000_100]).all()


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")], [float("inf")]])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match="weight"):
        Blend(weights)
