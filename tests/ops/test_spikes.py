"""Spike counts, encodings and the spiking linear layer against the worked examples of the report and plain formulas."""

import pytest
import torch

import ops
from op_oracles import assert_same

X = torch.tensor([0.9, -2.1, 0.1, 0.4, -0.05, 3.0, -0.6, 0.25])


def test_worked_example():
    count, threshold = ops.spike_count(X)
    assert threshold.item() == pytest.approx(0.308333, abs=1e-6)
    assert count.tolist() == [3, -7, 0, 1, 0, 10, -2, 1]
    assert count.dtype == torch.int32


def test_threshold_is_per_token_and_clamped():
    x = torch.stack([X, 10 * X, 0 * X])
    count, threshold = ops.spike_count(x)
    assert torch.equal(count[0], count[1])
    assert threshold[2].item() == pytest.approx(1e-5)
    assert not count[2].any()


@pytest.mark.parametrize(
    "encoding, count, num_steps, expected",
    [
        ("binary", 5, 8, [1, 1, 1, 1, 1, 0, 0, 0]),
        ("ternary", -5, 8, [-1, -1, -1, -1, -1, 0, 0, 0]),
        ("bitwise", 5, None, [1, 0, 1]),
        ("bitwise", 1, 4, [0, 0, 0, 1]),
        ("bidirectional", -5, None, [-1, 0, -1]),
        ("twos_complement", -5, 4, [1, 0, 1, 1]),
        ("twos_complement", 5, 4, [0, 1, 0, 1]),
    ],
)
def test_encoding_examples(encoding, count, num_steps, expected):
    spikes = ops.spike_encode(torch.tensor([count]), encoding=encoding, num_steps=num_steps)
    assert spikes[:, 0].tolist() == expected


@pytest.mark.parametrize("encoding", ["binary", "ternary", "bitwise", "bidirectional", "twos_complement"])
def test_decode_inverts_encode(encoding):
    low = 0 if encoding in ("binary", "bitwise") else -40
    count = torch.randint(low, 41, (3, 50), dtype=torch.int32)
    spikes = ops.spike_encode(count, encoding=encoding)
    assert set(spikes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(ops.spike_decode(spikes, encoding=encoding), count)


@pytest.mark.parametrize("largest, steps", [(0, 1), (7, 3), (8, 4), (127, 7), (128, 8), (255, 8), (256, 9)])
def test_fewest_bitwise_steps(largest, steps):
    assert len(ops.spike_encode(torch.tensor([largest]), encoding="bitwise")) == steps


def test_encoding_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="no negative counts"):
        ops.spike_encode(torch.tensor([-1]), encoding="bitwise")
    with pytest.raises(ValueError, match="use at least 4"):
        ops.spike_encode(torch.tensor([8]), encoding="bidirectional", num_steps=3)
    with pytest.raises(ValueError, match="num_steps=4.5 must be a whole number"):
        ops.spike_encode(torch.tensor([8]), encoding="bidirectional", num_steps=4.5)
    with pytest.raises(ValueError, match="choose from: binary"):
        ops.spike_encode(torch.tensor([8]), encoding="morse")


def test_linear_uses_counts_and_passes_gradients_straight_through():
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6)
    scale = weight.view(6, 2, 4).abs().amax(-1, keepdim=True) / 127
    leaves = [y.clone().requires_grad_() for y in (x, weight, bias)]
    y = ops.spike_linear(*leaves, weight_scale=scale)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    threshold = x.abs().mean(-1, keepdim=True) / 3
    seen = (x / threshold).round() * threshold
    stored = ((weight.view(6, 2, 4) / scale).round() * scale).view(6, 8)
    assert_same([y.detach()], [seen @ stored.T + bias], 1e-6)
    assert not torch.allclose(seen, x, atol=1e-3)
    expected = [upstream @ stored, torch.einsum("btf,btd->fd", upstream, seen), upstream.sum((0, 1))]
    assert_same([leaf.grad for leaf in leaves], expected, 1e-5)


def test_linear_equals_the_sum_over_spike_steps():
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    count, threshold = ops.spike_count(x)
    spikes = ops.spike_encode(count, encoding="bidirectional")
    steps = torch.arange(len(spikes) - 1, -1, -1)
    total = threshold * sum(2.0**step * (train @ weight.T) for step, train in zip(steps, spikes))
    assert_same([ops.spike_linear(x, weight)], [total], 1e-5)
