"""What the neurons of a pipeline stage do at the ends of a training step: warm in, and say how sparse they are."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ops
from parallel.place import primitive
from sbtrain.config.spiking_schema import SpikingConfig
from sbtrain.spiking.neuron import Neuron, neurons, set_share
from sbtrain.spiking.statistics import sparsity

SAMPLE_TOKENS = 128
"""Tokens of a step that each neuron's sparsity is measured on, evenly spread over the first row of a rank."""


class SpikeSteps:
    """The neurons of a pipeline stage or of one of its chunks. All have one, also where nothing spikes."""

    def __init__(self, chunks: list[nn.Module], spiking: SpikingConfig):
        """chunks: the layers."""
        self._chunks, self._spiking = chunks, spiking
        self._neurons = [neuron for chunk in chunks for neuron in neurons(chunk)]
        self._share = 1.0
        self._sums: Tensor | None = None

    def joined(self, others: list[SpikeSteps]) -> SpikeSteps:
        """The same over the layers of the stage's other chunks too."""
        return SpikeSteps([chunk for steps in (self, *others) for chunk in steps._chunks], self._spiking)

    def trained(self, tokens: int) -> None:
        """Replace as much as belongs to so many tokens of training."""
        self._share = self._spiking.share_after(tokens)
        for chunk in self._chunks:
            set_share(chunk, self._share)

    def begin(self) -> None:
        """Before the first forward pass of a step: every neuron's next input is sampled."""
        if not self._spiking.enabled:
            return
        self._sums = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
        for neuron in self._neurons:
            neuron.observer = self._sample

    def end(self) -> dict:
        """After the step: what metrics.jsonl says of spikes. Collective where the model spikes.

        spike_sparsity is the mean over all neurons and ranks. spike_share is there where the recipe warms in.
        """
        if not self._spiking.enabled:
            return {}
        for neuron in self._neurons:
            neuron.observer = None
        with primitive("sparsity of spikes"):
            dist.all_reduce(self._sums)
        total, num_neurons = self._sums.tolist()
        share = {"spike_share": self._share} if self._spiking.warm_in_tokens else {}
        return {"spike_sparsity": total / max(num_neurons, 1.0), **share}

    @torch.no_grad()
    def _sample(self, neuron: Neuron, x: Tensor, mean_abs: Tensor | None, counted: Tensor | None) -> None:
        """Add the sparsity of some tokens of x [..., D], once a step; of queries [1,T,H,D] with all their heads."""
        neuron.observer = None
        last = 1 if neuron.site == "queries" else -2
        x = x.flatten(0, last)
        num_rows = len(x) if counted is None else len(counted)
        if not num_rows:
            return
        picked = torch.arange(0, num_rows, -(-num_rows // SAMPLE_TOKENS), device=x.device)
        picked = picked if counted is None else counted[picked]
        mean_abs = None if mean_abs is None else mean_abs.flatten(0, last)[picked]
        count, _ = ops.spike_count(x[picked], k=neuron.k, mean_abs=mean_abs)
        self._sums[0] += sparsity(count)
        self._sums[1] += 1
