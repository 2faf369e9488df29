"""What all mixtures of experts of a stage do at the ends of a training step, and what they report."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parallel.expert import sum_over_all
from sbtrain.config.model_schema import MoEConfig
from sbtrain.moe.layer import MoELayer


class ExpertSteps:
    """The mixtures of experts of a pipeline stage or of one of its chunks. All have one, also without such layers."""

    def __init__(self, layers: dict[int, MoELayer], *, all_layers: list[int], moe: MoEConfig):
        """layers: those of this stage, by global layer index; all_layers: the indices of the whole model's."""
        self._layers, self._all, self._moe = layers, all_layers, moe
        self._has_load = False

    def joined(self, others: list[ExpertSteps]) -> ExpertSteps:
        """The same over the layers of the stage's other chunks too."""
        layers = {index: layer for steps in (self, *others) for index, layer in steps._layers.items()}
        return ExpertSteps(layers, all_layers=self._all, moe=self._moe)

    def begin(self, *, num_tokens: int) -> None:
        """Before the first forward pass of a step of num_tokens tokens over all ranks."""
        for layer in self._layers.values():
            layer.router.step_tokens = num_tokens
            layer.router.tally.take()
            layer.hot.begin_step()

    def lacks_load(self) -> bool:
        """Whether the aux loss of this step weighs with its own load, which a forward pass has to find first.

        Then do that and call take_load. Collective where no load is known yet.
        """
        if not self._all or self._moe.aux_loss_coeff == 0:
            return False
        if self._moe.exact_aux_loss:
            return True
        if self._has_load:
            return False
        unknown = [torch.zeros((), device=torch.cuda.current_device())]
        unknown += [(layer.router.load.sum() == 0).float() for layer in self._layers.values()]
        total = torch.stack(unknown).sum()
        sum_over_all(total)
        self._has_load = not total
        return not self._has_load

    def take_load(self) -> None:
        """After the forward pass that lacks_load has asked for. Collective."""
        totals = self._totals()
        for index, layer in self._layers.items():
            layer.router.take_load(totals[self._all.index(index)])
        self._has_load = True

    def before_reduction(self) -> None:
        """After the last backward pass, before gradients are reduced over data-parallel ranks."""
        for layer in self._layers.values():
            layer.router.step_tokens = None
            layer.hot.hand_over()

    def end(self, *, skipped: bool = False) -> dict:
        """After the step: balance for the next one, unless it was skipped, whose load is none to learn from.

        Returns what metrics.jsonl says of the experts. Collective.
        """
        if not self._all:
            return {}
        totals = self._totals()
        tallies = {index: _Load(row, self._moe.num_experts) for index, row in zip(self._all, totals.tolist())}
        if not skipped:
            for index, layer in self._layers.items():
                layer.router.end_step(totals[self._all.index(index)])
                layer.choose_hot(tallies[index].times_even)
        return {"experts": _report(tallies)}

    def _totals(self) -> Tensor:
        """Tallies over all ranks, and the copied experts behind them, fp64 [layers of the model, 2 E + 2]."""
        size = (len(self._all), 2 * self._moe.num_experts + 2)
        totals = torch.zeros(size, dtype=torch.float64, device=torch.cuda.current_device())
        for index, layer in self._layers.items():
            row = totals[self._all.index(index)]
            row[:-1] = layer.router.tally.take()
            if layer.groups.dp_cp.rank() == 0 and layer.groups.tp.rank() == 0:
                row[-1] = layer.hot.num_copied
        sum_over_all(totals)
        return totals


class _Load:
    """A layer's tally in words: times_even is each expert's load over the even share."""

    def __init__(self, row: list[float], num_experts: int):
        counts, scores = row[:num_experts], row[num_experts:-2]
        total = max(sum(counts), 1.0)
        shares = [count / total for count in counts]
        self.times_even = [share * num_experts for share in shares]
        self.entropy = -sum(share * math.log(share) for share in shares if share) / math.log(max(num_experts, 2))
        self.aux_loss = num_experts * sum(s * p for s, p in zip(shares, scores)) / max(sum(scores), 1e-20)
        self.dropped, self.copies = int(row[-2]), int(row[-1])


def _report(loads: dict[int, _Load]) -> dict:
    layers = {
        str(index): {"load_min": min(load.times_even), "load_max": max(load.times_even), "entropy": load.entropy}
        for index, load in loads.items()
    }
    return {
        "load_min": min(layer["load_min"] for layer in layers.values()),
        "load_max": max(layer["load_max"] for layer in layers.values()),
        "entropy": sum(layer["entropy"] for layer in layers.values()) / len(layers),
        "aux_loss": sum(load.aux_loss for load in loads.values()) / len(loads),
        "dropped": sum(load.dropped for load in loads.values()),
        "copies": sum(load.copies for load in loads.values()),
        "layers": layers,
        "load": {str(index): [round(times, 4) for times in load.times_even] for index, load in loads.items()},
    }
