"""Copies of hot experts: while the load is skewed, every rank holds the hottest experts and their tokens stay there.

Copies are made when a step begins, with the weights that the whole step uses, and give their gradients to the owner
when it ends; so what an expert learns is the same sum in another order (report, section 4.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

import ops
from parallel.expert import copy_from, sum_at
from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.moe.experts import Experts


class HotExperts:
    """The copies of one layer's hot experts on this rank."""

    def __init__(self, experts: Experts, *, num_experts: int, options: ExpertsConfig, group):
        self._experts, self._group, self._options = experts, group, options
        self._num_local = num_experts // group.size()
        self.chosen: tuple[int, ...] = ()
        self.active: tuple[int, ...] = ()
        self.num_copied = 0
        self.weights: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def begin_step(self) -> None:
        """Fetch the weights of the chosen experts. Collective over the expert-parallel group."""
        self.active, self.num_copied = self.chosen, len(self.chosen)
        for weight in self._experts.parameters():
            weight.has_copies = bool(self.active)  # holds its reduction back, see parallel.gradients
        if not self.active:
            return
        own = (self._experts.linear_fc1, self._experts.linear_fc2)
        copies = [weight.new_empty(len(self.active), *weight.shape[1:]) for weight in own]
        for slot, expert in enumerate(self.active):
            owner, index = divmod(expert, self._num_local)
            for weight, copy in zip(own, copies):
                if owner == self._group.rank():
                    copy[slot].copy_(weight[index])
                copy_from(owner, copy[slot], group=self._group)
        self.weights = tuple(copy.requires_grad_() for copy in copies)
        self._sums = tuple(torch.zeros_like(copy, dtype=torch.float32) for copy in copies)
        for copy, total in zip(self.weights, self._sums):
            copy.register_post_accumulate_grad_hook(_add_to(total))

    @torch.no_grad()
    def hand_over(self) -> None:
        """Add the copies' gradients to their owners' main_grad, and let the copies go. Collective over the group."""
        if not self.active:
            return
        for slot, expert in enumerate(self.active):
            owner, index = divmod(expert, self._num_local)
            for weight, total in zip((self._experts.linear_fc1, self._experts.linear_fc2), self._sums):
                sum_at(owner, total[slot], group=self._group)
                if owner == self._group.rank():
                    weight.main_grad[index].add_(total[slot])
        self.active, self.weights, self._sums = (), None, None

    def choose(self, load: list[float]) -> None:
        """Choose for the next step. load: the choices of each expert in the last one, over its even share."""
        options = self._options
        hot = [
            expert
            for expert, times in enumerate(load)
            if times > options.copy_above or (expert in self.chosen and times >= options.release_below)
        ]
        hot.sort(key=lambda expert: (-load[expert], expert))
        self.chosen = tuple(sorted(hot[: options.max_copies]))

    def take_over(self, chosen: list[int]) -> None:
        """Go on with what was chosen before a checkpoint, as far as copies are still wanted."""
        self.chosen = tuple(chosen[: self._options.max_copies])


def _add_to(total: Tensor):
    def hook(copy: Tensor) -> None:
        ops.accumulate(total, copy.grad, add=True)
        copy.grad = None

    return hook
