"""The peer's optimizer, of the engine's precision: fp32 master weights, fp32 gradients, fp32 Adam moments, clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from sbtrain.config.schema import OptimConfig


class MasterAdamW:
    """AdamW on fp32 copies of the weights. A gradient is cast to fp32 as soon as autograd has it, and then freed.

    For one micro-batch a step: a second backward pass before step() replaces the gradients of the first.
    """

    def __init__(self, weights: list[Tensor], *, optim: OptimConfig, lr: float):
        self.weights, self.clip_grad = weights, optim.clip_grad
        self.masters = [weight.detach().clone().float() for weight in weights]
        for weight, master in zip(weights, self.masters):
            master.grad = torch.zeros_like(master)
            weight.register_post_accumulate_grad_hook(_into(master))
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": optim.weight_decay},
            {"params": [m for m in self.masters if m.ndim == 1], "weight_decay": 0.0},
        ]
        betas = (optim.beta1, optim.beta2)
        on_gpu = weights[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=optim.eps, fused=on_gpu or None)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Clip, update, and return the gradient norm before clipping (a tensor: nothing waits for it)."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip_grad)
        self.adam.step()
        torch._foreach_copy_(self.weights, self.masters)
        return norm


def _into(master: Tensor):
    def take(weight: Tensor) -> None:
        master.grad.copy_(weight.grad)
        weight.grad = None

    return take
