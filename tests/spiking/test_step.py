"""What a training step says of its neurons."""

from __future__ import annotations

import torch

import ops
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.place import section
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.spiking.neuron import Neuron
from sbtrain.spiking.statistics import sparsity
from sbtrain.spiking.step import SAMPLE_TOKENS, SpikeSteps


def sampled(neuron: Neuron, x: torch.Tensor) -> float:
    """spike_sparsity of a step in which the neuron sees x."""
    with Mesh.build(Layout()), section("test"):
        steps = SpikeSteps([neuron], SpikingConfig(enabled=True))
        steps.begin()
        neuron(x)
        neuron(torch.zeros_like(x))  # of the step's first input alone
        return steps.end()["spike_sparsity"]


def test_all_heads_of_queries_are_sampled():
    """Also where tokens times heads is a multiple of the sample."""
    x = torch.randn(1, 2 * SAMPLE_TOKENS, 4, 16)
    x[:, :, 0] = 0
    found = sampled(Neuron(k=3.0, site="queries", layer=0), x)
    assert abs(found - float(sparsity(ops.spike_count(x[:, ::2])[0]))) < 1e-6 and found < 0.95


def test_rows_that_do_not_count_are_not_sampled():
    x, counted = torch.randn(3 * SAMPLE_TOKENS, 24), torch.arange(5, 3 * SAMPLE_TOKENS, 3)
    filled = torch.zeros_like(x).index_copy(0, counted, x[counted])
    neuron = Neuron(k=3.0, site="down", layer=0)
    with Mesh.build(Layout()), section("test"):
        steps = SpikeSteps([neuron], SpikingConfig(enabled=True))
        steps.begin()
        neuron.spike(filled, None, counted)
        found = steps.end()["spike_sparsity"]
    assert abs(found - float(sparsity(ops.spike_count(x[counted])[0]))) < 1e-6


def test_few_tokens_are_sampled_whole():
    x = torch.randn(SAMPLE_TOKENS, 1, 24)
    found = sampled(Neuron(k=2.0, site="qkv", layer=0), x)
    assert abs(found - float(sparsity(ops.spike_count(x, k=2.0)[0]))) < 1e-6
