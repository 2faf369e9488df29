"""ZeCO for gated linear attention: the entering state travels from rank to rank, in blocks, forward and backward.

A rank waits for the state that enters its shard, and hands on what leaves it (see parallel/sequence/states.py):

    out = exp(decay) * in + state

Cut into blocks of key channels, a block is on its way to the next rank while the one behind it arrives. After
sp - 1 + blocks rounds the last rank has all of it. On GPUs this runs on a stream of its own, beside what the shard can
compute without the state; whoever waits for the result waits for that stream, and with it for every transfer.

Elements that each rank but the last sends, a layer: Hkv * K * V in fp32 forward, and each but the first as many
backward: the same for every sp.

Source: ZeCO (arXiv 2507.01004), All-Scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.place import primitive

LEAST_BLOCK_BYTES = 1 << 20
"""A block below latency times bandwidth takes longer to be sent off than to be carried: 2.9 MB between two H200s of one
host (docs/performance.md), 0.4 MB where a network has 10 us and 40 GB/s."""


def exchange(
    state: Tensor, decay: Tensor, *, group, reverse: bool, num_blocks: int | None = None
) -> Callable[[], Tensor]:
    """Start the scan; the function returned waits for it and gives the state [Hkv, K, V] that enters this rank.

    state fp32 [Hkv, K, V] and decay [Hkv, K] of this rank; reverse: from the last rank to the first. num_blocks: None
    chooses by the state's size. Collective. On CPU nothing moves before the wait.
    """
    blocks = num_blocks or blocks_of(state)
    if state.device.type != "cuda":
        return lambda: _scan(state, decay, group, reverse, blocks)
    here, side = torch.cuda.current_stream(), _side_stream(state.device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        entering = _scan(state, decay, group, reverse, blocks)

    def wait() -> Tensor:
        now = torch.cuda.current_stream()
        now.wait_stream(side)
        entering.record_stream(now)
        for x in (state, decay):  # were read on the other stream until here
            x.record_stream(side)
        return entering

    return wait


def blocks_of(state: Tensor) -> int:
    """Into how many blocks of key channels a state [Hkv, K, V] is cut."""
    return min(state.shape[1], max(1, math.ceil(state.numel() * state.element_size() / LEAST_BLOCK_BYTES)))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _scan(state: Tensor, decay: Tensor, group, reverse: bool, num_blocks: int) -> Tensor:
    """A round receives one block and sends the one that came the round before."""
    rank, step = group.rank(), -1 if reverse else 1
    before, after = (other if 0 <= other < group.size() else None for other in (rank - step, rank + step))
    own = [part.contiguous() for part in state.chunk(num_blocks, dim=1)]
    factors = [part.exp()[..., None] for part in decay.chunk(num_blocks, dim=1)]
    entering = [torch.zeros_like(part) if before is None else torch.empty_like(part) for part in own]
    for number in range(len(own) + 1):
        transfers = []
        if before is not None and number < len(own):
            transfers.append(dist.P2POp(dist.irecv, entering[number], group=group, group_peer=before))
        if after is not None and number > 0:
            leaving = torch.addcmul(own[number - 1], factors[number - 1], entering[number - 1])
            transfers.append(dist.P2POp(dist.isend, leaving, group=group, group_peer=after))
        with primitive("zeco all-scan"):
            for work in dist.batch_isend_irecv(transfers) if transfers else ():
                work.wait()
    return torch.cat(entering, dim=1)
