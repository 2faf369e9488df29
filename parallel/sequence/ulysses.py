"""Ulysses: exchange a shard of the sequence with all heads for the whole sequence with some heads, and back.

DeepSpeed-Ulysses (arXiv 2309.14509) with exact head padding, so that any head count works on any sp size:
  sp <= Hkv  kv heads are padded to a multiple of sp, q heads to G times that (9/3 heads at sp 2 become 12/4);
  sp >  Hkv  sp is a multiple of Hkv; each kv head goes to sp/Hkv ranks, and the q heads of its group, padded to a
             multiple of sp/Hkv, are dealt among them (28/4 at sp 8 becomes 32 q heads, 4 a rank, one kv head each).
Padding is zeros and dropped after the exchange; gradients of copied kv heads add up.

Elements that each rank receives, a layer, with T tokens and Hq, Hkv the numbers of heads that travel, padding and
copies included: (sp - 1) / sp * T / sp * (Hq + Hkv) * (D + V) forward, for q and o, k and v, and of linear attention
Hkv * K more a token for the decays; backward as many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.collectives import all_gather, all_to_all

PAD = -1
"""In a plan of heads: one of zeros."""
_NAME = "ulysses all-to-all"


def head_plan(*, num_heads: int, num_kv_heads: int, sp: int) -> tuple[list[int], list[int]]:
    """Which q heads and which kv heads travel, in the order of their destination ranks; -1 is a head of zeros.

    Raises ValueError when sp > num_kv_heads is not a multiple of it.
    """
    group = num_heads // num_kv_heads
    if sp <= num_kv_heads:
        padded = -(-num_kv_heads // sp) * sp
        kv = [head if head < num_kv_heads else PAD for head in range(padded)]
        q = [head if head < num_heads else PAD for head in range(padded * group)]
        return q, kv
    problem = heads_problem(num_kv_heads=num_kv_heads, sp=sp)
    if problem:
        raise ValueError(problem)
    copies = sp // num_kv_heads
    padded_group = -(-group // copies) * copies
    kv = [head for head in range(num_kv_heads) for _ in range(copies)]
    q = [head * group + i if i < group else PAD for head in range(num_kv_heads) for i in range(padded_group)]
    return q, kv


def heads_problem(*, num_kv_heads: int, sp: int) -> str | None:
    """Why the kv heads of a tp rank cannot be dealt to sp ranks (begins with `layout.`), or None."""
    if sp <= num_kv_heads or sp % num_kv_heads == 0:
        return None
    return (
        f"layout.sp={sp} is larger than the {num_kv_heads} key/value heads of a tp rank and no multiple; "
        f"choose an sp up to {num_kv_heads}, or a multiple of {num_kv_heads}"
    )


class Ulysses:
    """The exchange of one mixer. Tensors are [1, T/sp, H, ...] outside and [1, T, H', ...] inside."""

    def __init__(self, *, num_heads: int, num_kv_heads: int, group):
        self.group = group
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.q_heads, self.kv_heads = head_plan(num_heads=num_heads, num_kv_heads=num_kv_heads, sp=group.size())

    def gather(self, q: Tensor, *kv: Tensor) -> tuple[Tensor, ...]:
        """Whole sequence, this rank's heads: q [1,T/sp,Hq,D] -> [1,T,Hq',D], each kv [1,T/sp,Hkv,D] -> [1,T,Hkv',D]."""
        if self.group.size() == 1:
            return (q, *kv)
        q = to_heads(q, self.q_heads, self.group)
        return (q, *(to_heads(x, self.kv_heads, self.group) for x in kv))

    def scatter(self, o: Tensor) -> Tensor:
        """The way back for the output. o [1,T,Hq',V] -> [1,T/sp,Hq,V]."""
        if self.group.size() == 1:
            return o
        return to_tokens(o, self.q_heads, self.num_heads, self.group)

    def own(self, x: Tensor, *, dim: int) -> Tensor:
        """Of what every rank has for all Hkv heads in dim, what goes with this rank's heads inside, Hkv' of them.

        Nothing travels. Gradients are of the heads that this rank has: those of all ranks add up to the whole.
        """
        if self.group.size() == 1:
            return x
        num_own = len(self.kv_heads) // self.group.size()
        heads = self.kv_heads[self.group.rank() * num_own :][:num_own]
        if PAD in heads:
            x = torch.cat([x, torch.zeros_like(x.narrow(dim, 0, 1))], dim=dim)
        return x[(slice(None),) * dim + (heads,)]

    def all_heads(self, state: Tensor) -> Tensor:
        """What a row leaves behind, by kv head: this rank's [1,Hkv',...] -> [1,Hkv,...]. Without gradients.

        Receives (sp - 1) * Hkv' elements of a head's size.
        """
        if self.group.size() == 1:
            return state
        gathered = all_gather(state[0].detach().contiguous(), group=self.group, name="ulysses all-gather")
        return _select(gathered().flatten(0, 1), self.kv_heads, self.num_kv_heads, dim=0)[None]


def to_heads(x: Tensor, heads: list[int], group) -> Tensor:
    """x [1,T/sp,H,...] -> [1,T,len(heads)/sp,...]: this rank's part of `heads`, of the whole sequence."""
    if heads != list(range(x.shape[2])):
        zeros = x.new_zeros(*x.shape[:2], 1, *x.shape[3:])
        x = torch.cat([x, zeros], dim=2)[:, :, heads]
    return all_to_all(x, group=group, split_dim=2, concat_dim=1, name=_NAME)


def to_tokens(o: Tensor, heads: list[int], num_heads: int, group) -> Tensor:
    """The way back of `to_heads`: o [1,T,len(heads)/sp,V] -> [1,T/sp,num_heads,V]."""
    o = all_to_all(o, group=group, split_dim=1, concat_dim=2, name=_NAME)
    return _select(o, heads, num_heads, dim=2)


def _select(x: Tensor, heads: list[int], num_heads: int, *, dim: int) -> Tensor:
    """Each head once, in order, without padding. heads: which ones dim holds."""
    slots = [heads.index(head) for head in range(num_heads)]
    if slots == list(range(x.shape[dim])):
        return x
    return x[(slice(None),) * dim + (slots,)]
