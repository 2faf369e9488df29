"""Neurons by themselves: straight-through gradients, shares, observers, and INT8 keys and values."""

from __future__ import annotations

import pytest
import torch

import ops
from parallel.recompute import recomputed
from sbtrain.spiking.neuron import KeyValueRounding, Neuron, activated, from_int8, neurons, set_share, to_int8

X = torch.tensor([0.9, -2.1, 0.1, 0.4, -0.05, 3.0, -0.6, 0.25])
SEEN = [0.925, -2.1583, 0, 0.3083, 0, 3.0833, -0.6167, 0.3083]


def neuron_of(**changes) -> Neuron:
    return Neuron(**{"k": 3.0, "site": "qkv", "layer": 0, **changes})


def test_worked_example():
    torch.testing.assert_close(neuron_of()(X), torch.tensor(SEEN), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_values_lie_on_the_way_and_gradients_pass_straight_through(share, dtype):
    neuron, x = neuron_of(k=2.0), torch.randn(5, 3, 16, dtype=dtype, requires_grad=True)
    neuron.share = share
    y = neuron(x)
    replaced = ops.spike_values(x.detach(), k=2.0)
    assert y.dtype == dtype
    torch.testing.assert_close(y.detach(), torch.lerp(x.detach(), replaced, share), rtol=0, atol=0)
    upstream = torch.randn_like(y)
    (y * upstream).sum().backward()
    assert torch.equal(x.grad, upstream)


def test_zeros_nothing_and_what_is_not_finite():
    neuron = neuron_of()
    assert torch.equal(neuron(torch.zeros(2, 4)), torch.zeros(2, 4))
    assert neuron(torch.empty(0, 4)).shape == (0, 4) and torch.equal(
        neuron(torch.tensor([[-7.0]])), torch.tensor([[-7.0]])
    )
    for broken in (float("nan"), float("inf")):
        found = neuron(torch.tensor([[1.0, broken, 2.0], [1.0, 2.0, 3.0]]))
        assert not found[0].isfinite().all() and found[1].isfinite().all()


def test_an_observer_sees_inputs_once_and_in_full_precision():
    neuron, x, seen = neuron_of(), torch.randn(4, 8, requires_grad=True), []
    neuron.observer = lambda *seen_here: seen.append(seen_here)
    recomputed(neuron, x).sum().backward()
    ((who, what, mean_abs, counted),) = seen
    assert who is neuron and torch.equal(what, x) and mean_abs is None and counted is None
    neuron.share = 0.0
    neuron(x)
    assert len(seen) == 2


def test_what_a_down_projection_reads_is_made_again_bit_by_bit():
    gate_up, neuron, seen = torch.randn(6, 20), neuron_of(site="down"), []
    neuron.observer = lambda *seen_here: seen.append(seen_here)
    active, again = activated(gate_up, neuron)
    assert torch.equal(active, ops.spike_values(ops.swiglu(gate_up))) and torch.equal(again(), active)
    assert len(seen) == 1
    plain, again = activated(gate_up, None)
    assert torch.equal(plain, ops.swiglu(gate_up)) and torch.equal(again(), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_in_int8(dtype):
    x = torch.randn(1, 9, 2, 8, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        x[0, 3, 1] = 0
    count, scale = to_int8(x.detach())
    assert count.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (1, 9, 2, 1)
    assert count[0, :3].abs().amax(-1).eq(127).all() and not count[0, 3, 1].any()
    rounding = KeyValueRounding()
    y = rounding(x)
    assert torch.equal(y, from_int8(count, scale, dtype=dtype))
    assert ((y - x).abs() <= scale * 0.5 + 0.01 * x.abs()).all()
    y.sum().backward()
    assert x.grad.eq(1).all()
    rounding.share = 0.0
    assert rounding(x) is x


def test_shares_and_lists_reach_every_neuron():
    model = torch.nn.Sequential(neuron_of(), torch.nn.Linear(2, 2), torch.nn.ModuleDict({"a": KeyValueRounding()}))
    set_share(model, 0.5)
    assert [neuron.site for neuron in neurons(model)] == ["qkv"]
    assert model[0].share == model[2]["a"].share == 0.5
    assert not model[0].state_dict() and not list(model[0].parameters())
