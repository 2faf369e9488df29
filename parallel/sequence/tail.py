"""The end of a row, from the shards that hold it to the ranks that go on from there.

Elements that each keeper receives: the kept tokens that are not its own, times the size of a token; others receive
none. To keep the whole row on every rank, each sends its shard to all: the copies take as much memory as the result
until they are sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.collectives import exchange_rows
from parallel.sequence.shard import tail_lengths


def tail(x: Tensor, num_tokens: int | None, *, keepers: range, group) -> Tensor:
    """The last num_tokens tokens of a row, None for all: x [1, T/sp, ...] of each rank -> [1, at most T, ...].

    keepers: the ranks that get them; on others the result has no tokens. Collective, without gradients.
    """
    num_tokens = x.shape[1] * group.size() if num_tokens is None else num_tokens
    lengths = tail_lengths(num_tokens, shard_tokens=x.shape[1], size=group.size())
    own = x[0, x.shape[1] - lengths[group.rank()] :]
    send = [len(own) if rank in keepers else 0 for rank in range(group.size())]
    receive = lengths if group.rank() in keepers else [0] * group.size()
    sent = torch.cat([own] * len(keepers))
    return exchange_rows(sent, send=send, receive=receive, group=group, name="caches all-to-all")[None]
