"""LASP-2 for gated linear attention: one all-gather of all shards' states and decays, forward and backward.

Every rank combines those of the ranks before it into the state that enters its own shard; see
parallel/sequence/states.py for the recurrence.

Elements that each rank receives, a layer: (sp - 1) * Hkv * (K * V + K) forward, and as many backward, in fp32. The
decays travel both ways rather than being kept from one pass to the other, sp * Hkv * K of them a layer.

Source: LASP-2 (arXiv 2502.07563), algorithm 2, with the decays of gated linear attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parallel.collectives import all_gather


def exchange(state: Tensor, decay: Tensor, *, group, reverse: bool) -> Callable[[], Tensor]:
    """Start the all-gather; the function returned waits for it and gives the state [Hkv, K, V] that enters this rank.

    state fp32 [Hkv, K, V] and decay [Hkv, K] of this rank; reverse: from the last rank to the first. Collective.
    """
    gathered = all_gather(torch.cat([state, decay[..., None]], dim=-1), group=group, name="lasp2 all-gather")

    def wait() -> Tensor:
        everyone = gathered()
        states, decays = everyone[..., :-1], everyone[..., -1]
        rank, size = group.rank(), group.size()
        entering = torch.zeros_like(state)
        for other in range(size - 1, rank, -1) if reverse else range(rank):
            entering = torch.addcmul(states[other], decays[other].exp()[..., None], entering)
        return entering

    return wait
