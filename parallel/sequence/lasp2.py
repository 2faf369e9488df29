"""LASP-2 for gated linear attention: shards of a row exchange their states in one all-gather, forward and backward.

Each rank reduces its shard to the state that the shard alone leaves behind and the decay it puts on what came before,
all-gathers both, and combines those of the ranks on its left into the state that enters its own shard:

    state_in[0] = 0        state_in[r + 1] = exp(decay[r]) * state_in[r] + state[r]

The backward pass is the same recurrence from the right, on the gradients of the entering states. A document that
starts in a shard has decay -inf there (ops.gla_state), so nothing crosses it, and every rank makes the same calls
whatever its documents are.

Elements that each rank receives, a layer: (sp - 1) * Hkv * (K * V + K) forward, and as many backward, in fp32. The
decays travel both ways rather than being kept from one pass to the other, sp * Hkv * K of them a layer.

Source: LASP-2 (arXiv 2502.07563), algorithm 2, with the decays of gated linear attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import ops
from parallel.collectives import all_gather
from parallel.sequence.shard import shard_documents


def gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, cu_seqlens: Tensor, group) -> Tensor:
    """ops.gla on one shard of a row, the shards of the group's ranks side by side: o [1, T/sp, Hq, V].

    q [1, T/sp, Hq, K], k and log_decay [1, T/sp, Hkv, K], v [1, T/sp, Hkv, V]; cu_seqlens int32 [N+1] of the whole row.
    Collective, and so is its backward pass. Any number of heads goes with any sp.
    """
    if group.size() == 1:
        return ops.gla(q, k, v, log_decay, cu_seqlens=cu_seqlens)[0]
    documents = shard_documents(cu_seqlens, rank=group.rank(), size=group.size())
    state, decay = ops.gla_state(k, v, log_decay, cu_seqlens=documents)
    state_in, q = _Enter.apply(state, decay, q, group)
    return ops.gla_output(q, k, v, log_decay, state_in, cu_seqlens=documents)


class _Enter(torch.autograd.Function):
    """The state that enters this rank's shard, from what every shard leaves.

    q passes through: the output always depends on it, so that every rank's backward pass comes by here, also where no
    document enters and the state has no part in the output.
    """

    @staticmethod
    def forward(ctx, state: Tensor, decay: Tensor, q: Tensor, group):
        states, decays = _all_gather(state, decay, group)
        state_in = torch.zeros_like(state)
        for rank in range(group.rank()):
            state_in = torch.addcmul(states[rank], decays[rank].exp()[..., None], state_in)
        ctx.save_for_backward(decay, state_in)
        ctx.group = group
        return state_in, q.view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_q: Tensor):
        decay, state_in = ctx.saved_tensors
        grads, decays = _all_gather(grad, decay, ctx.group)
        grad_state = torch.zeros_like(grad)
        for rank in reversed(range(ctx.group.rank() + 1, ctx.group.size())):
            grad_state = torch.addcmul(grads[rank], decays[rank].exp()[..., None], grad_state)
        grad_decay = decay.exp() * (grad_state * state_in).sum(-1)
        return grad_state, grad_decay, grad_q, None


def _all_gather(state: Tensor, decay: Tensor, group) -> tuple[Tensor, Tensor]:
    """[sp, Hkv, K, V] and [sp, Hkv, K], by rank."""
    everyone = all_gather(torch.cat([state, decay[..., None]], dim=-1), group=group, name="lasp2 all-gather")
    return everyone[..., :-1], everyone[..., -1]
