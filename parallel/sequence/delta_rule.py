"""The gated delta rule over the shards of a row: by heads, as in Ulysses.

Its state could be handed on as gated linear attention's is, state_out = A state_in + B, with A the product of the
tokens' transitions I - beta k k^T, a K x K matrix a value head. But A is no by-product as a sum of decays is: it takes
another pass of K columns beside the V of the values, through every chunk, forward and backward: about as much work as
the op itself. At 32k tokens a rank, 16 query and key and 32 value heads of 128, that takes 5.3 ms forward and backward
on an H200, in which the all-to-alls of both passes, over 4 ranks, carry their 1.2 GB at 230 GB/s. Those of Ulysses
reached about as much inside a node, 6.9 GB in 3.3 % of a step of 932 ms (docs/performance.md): so the two are even
there, and heads need no kernels of their own. Across slower links the states would win.

Heads travel in units of those that share a state or are shared: with 16 query and key heads and 32 value heads, 16
units of one query, one key and two value heads. Elements that each rank receives, forward, with T tokens and the
padded numbers of heads: (sp - 1) / sp * T / sp * (HQ * K + HK * K + HV * (V + 2) + H * V); backward as many.
"""

from __future__ import annotations

from torch import Tensor

import ops
from parallel.sequence.ulysses import PAD, to_heads, to_tokens


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, cu_seqlens: Tensor, group, **how
) -> Tensor:
    """ops.gated_delta_rule on one shard of a row, the shards of the group's ranks side by side: o [1, T/sp, H, V].

    q [1, T/sp, HQ, K], k [1, T/sp, HK, K], v [1, T/sp, HV, V], log_decay and beta [1, T/sp, HV]; cu_seqlens int32 [N+1]
    of the whole row; how: scale and qk_l2norm. Collective, and so is its backward pass. Raises ValueError where the
    heads cannot be dealt to the ranks.
    """
    if group.size() == 1:
        return ops.gated_delta_rule(q, k, v, log_decay, beta, cu_seqlens=cu_seqlens, **how)[0]
    counts = [q.shape[2], k.shape[2], v.shape[2]]
    q_plan, k_plan, v_plan = plans = head_plans(counts, sp=group.size())
    q, k = to_heads(q, q_plan, group), to_heads(k, k_plan, group)
    v, log_decay, beta = (to_heads(x, v_plan, group) for x in (v, log_decay, beta))
    o, _ = ops.gated_delta_rule(q, k, v, log_decay, beta, cu_seqlens=cu_seqlens, **how)
    return to_tokens(o, plans[counts.index(max(counts))], max(counts), group)


def head_plans(counts: list[int], *, sp: int) -> list[list[int]]:
    """For each kind of heads, which travel, in the order of their destination ranks; -1 is a head of zeros.

    counts: heads of each kind, in blocks shared by heads of the others. Up to as many ranks as there are units, units
    of zeros fill up; of more ranks, several share a unit: its largest kind is split, those of one head are copied.
    Raises ValueError when sp does not fit.
    """
    units = min(counts)
    sizes = [count // units for count in counts]
    if sp <= units:
        padded = -(-units // sp) * sp
        return [[i if i < units * size else PAD for i in range(padded * size)] for size in sizes]
    copies = sp // units
    if sp % units or any(1 < size < max(sizes) and size % copies for size in sizes):
        raise ValueError(
            f"layout.sp={sp} does not fit {counts} query, key and value heads; choose an sp up to {units}, or a "
            f"multiple of {units} that divides the groups"
        )
    return [[head for unit in range(units) for head in _dealt(unit, size, copies)] for size in sizes]


def _dealt(unit: int, size: int, copies: int) -> list[int]:
    """The heads of one unit for the ranks that share it."""
    if size == 1:
        return [unit] * copies
    padded = -(-size // copies) * copies
    return [unit * size + i if i < size else PAD for i in range(padded)]
