"""Rows cut into chunks of tokens, with documents: what the chunked linear recurrences share.

A document boundary inside a chunk is a decay of -inf between two tokens, so packed rows need no re-layout.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops import documents


class Cuts(NamedTuple):
    """Where documents cut the flow of state. Bool; True: exp of the decay becomes 0.

    enter [M, C]: the state entering chunk m does not reach this token. leave [M, C]: this token does not reach the
    state leaving the chunk. through [M]: nothing passes from entering to leaving.
    """

    enter: Tensor
    leave: Tensor
    through: Tensor


def packed_ids(cu_seqlens: Optional[Tensor]) -> Optional[Tensor]:
    """Document of each token, int64 [T], or None when one document holds them all."""
    if cu_seqlens is None:
        return None
    ids = documents.document_ids(cu_seqlens)
    return ids if sum(b > a for a, b in _spans(cu_seqlens)) > 1 else None


def cut(ids: Tensor) -> Cuts:
    """Cuts of ids [M, C]; the state entering the first chunk belongs to the first token's document."""
    before = torch.cat([ids[:1, 0], ids[:-1, -1]])
    return Cuts(ids != before[:, None], ids != ids[:, -1:], ids[:, -1] != before)


def into_chunks(tensors: tuple, ids: Optional[Tensor], max_tokens: int) -> tuple[list[Tensor], Optional[Tensor]]:
    """Tensors [B, H, T, ...] as contiguous [B, H, M, C, ...], filled up with zeros, and ids as [M, C].

    C is max_tokens, or the next power of two for shorter rows.
    """
    num_tokens = tensors[0].shape[2]
    chunk = min(max_tokens, 1 << (num_tokens - 1).bit_length())
    fill = -num_tokens % chunk
    if fill:
        tensors = [pad(x, (0, 0) * (x.dim() - 3) + (0, fill)) for x in tensors]
        ids = None if ids is None else torch.cat([ids, ids[-1:].expand(fill)])
    return [x.unflatten(2, (-1, chunk)).contiguous() for x in tensors], None if ids is None else ids.view(-1, chunk)


def one_by_one(run: Callable, tensors: tuple, state: Optional[Tensor], cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """run(*tensors, state) -> (o [1, T, ...], final [1, ...]) on each document, where each has a state of its own."""
    parts = [
        run(*(x[:, a:b] for x in tensors), None if state is None else state[n : n + 1])
        for n, (a, b) in enumerate(_spans(cu_seqlens))
    ]
    return torch.cat([o for o, _ in parts], 1), torch.cat([final for _, final in parts])


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    bounds = documents.bounds(cu_seqlens)
    return list(zip(bounds, bounds[1:]))
