"""Row: one micro-batch with its documents, and the part of it that each sequence-parallel rank holds.

This file alone knows how a row is cut: contiguous shards of equal length, in rank order. Everything else sees either
the whole row's documents (after an exchange over heads) or its own shard of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ops import documents

IGNORE = -100
"""Label of a token whose prediction is not scored (the last token of a document, padding)."""


@dataclass(frozen=True)
class Row:
    """One row of T tokens holding packed documents.

    tokens: int64 [T]. labels: int64 [T], the next token of the same document, IGNORE where there is none.
    cu_seqlens: int32 [N+1], first 0, last T, non-decreasing; document n is tokens[cu_seqlens[n]:cu_seqlens[n+1]].
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device) -> Row:
        """The row on the device."""
        tokens, labels = (x.to(device, non_blocking=True) for x in (self.tokens, self.labels))
        return Row(tokens, labels, documents.to_device(self.cu_seqlens, device))


@dataclass(frozen=True)
class Documents:
    """What mixers know of documents: cu_seqlens int32 [N+1] of the whole row, positions int64 [T/sp] of the shard.

    keepers: with a cache, the sp ranks on which it is to hold what the row of shards leaves behind; None where there
    are no shards and this rank alone continues its cache.
    num_meta: rows of meta tokens before those of the shard, the same on every sp rank; positions begins with theirs.
    """

    cu_seqlens: Tensor
    positions: Tensor
    keepers: range | None = None
    num_meta: int = 0

    def with_meta(self, num_meta: int, *, rotated: bool, rows: bool = True) -> Documents:
        """Documents that begin behind num_meta tokens at positions 0, 1, ..., or where those are not rotated at 0.

        rows: whether the meta tokens' rows come with the shard's; otherwise caches have what is known of them.
        """
        positions = self.positions + num_meta if rotated else self.positions
        if not rows:
            return replace(self, positions=positions)
        own = torch.arange(num_meta, device=positions.device) * int(rotated)  # a rotation by 0 is none
        return replace(self, positions=torch.cat([own, positions]), num_meta=num_meta)


def positions_of(cu_seqlens: Tensor) -> Tensor:
    """Position of each token inside its document. cu_seqlens int32 [N+1] -> int64 [T]."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    num_tokens = documents.bounds(cu_seqlens)[-1]
    starts = torch.repeat_interleave(starts, lengths, output_size=num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts


def shard_row(row: Row, *, rank: int, size: int) -> tuple[Tensor, Tensor, Documents]:
    """Tokens and labels int64 [T/size] of one rank's contiguous shard, and the documents of the whole row.

    Raises ValueError when the row cannot be cut evenly.
    """
    num_tokens = row.tokens.shape[0]
    if num_tokens % size:
        raise ValueError(f"layout.sp={size} does not divide a row of {num_tokens} tokens; choose an sp that does")
    part = _part(num_tokens // size, rank)
    return row.tokens[part], row.labels[part], Documents(row.cu_seqlens, positions_of(row.cu_seqlens)[part])


def shard_prompt(tokens: Tensor, *, rank: int, size: int, keepers: range) -> tuple[Tensor, Documents, Tensor]:
    """A prompt int64 [T] of at least `size` tokens: one rank's shard, its documents, and the rest.

    The shards are a row of one document, size * (T // size) tokens; the rest is the T % size tokens after it.
    """
    part = _part(len(tokens) // size, rank)
    num_tokens = len(tokens) // size * size
    positions = torch.arange(part.start, part.stop, device=tokens.device)
    whole = with_bounds([0, num_tokens], tokens.device)
    return tokens[part], Documents(whole, positions, keepers), tokens[num_tokens:]


def tail_lengths(num_tokens: int, *, shard_tokens: int, size: int) -> list[int]:
    """How many of the row's last num_tokens tokens each rank's shard ends with."""
    parts = [_part(shard_tokens, rank) for rank in range(size)]
    return [min(shard_tokens, max(0, part.stop - (size * shard_tokens - num_tokens))) for part in parts]


def _part(shard_tokens: int, rank: int) -> slice:
    return slice(rank * shard_tokens, (rank + 1) * shard_tokens)


def cuts_of(cu_seqlens: Tensor, *, rank: int, size: int) -> list[int]:
    """Where documents start in one rank's shard, rising from 0 to T/size, both included; not at the row's own ends."""
    edges = documents.bounds(cu_seqlens)
    shard_tokens = edges[-1] // size
    first = rank * shard_tokens
    inner = sorted({edge - first for edge in edges if 0 < edge < edges[-1]})
    return [cut for cut in inner if 0 <= cut <= shard_tokens]


def shard_documents(cu_seqlens: Tensor, *, rank: int, size: int) -> Tensor:
    """cu_seqlens int32 [M+1] of one rank's shard, from the whole row's [N+1]; kept with the row's.

    Document 0 is the one that enters from the left, empty where another starts at the shard's first token; the last one
    is the one that leaves, empty where the next shard begins with a new one. So M - 1 documents start in the shard, and
    a document of the row that has no tokens is gone. This is what ops.gla_state and ops.gla_output read.
    """

    def build() -> Tensor:
        shard_tokens = documents.bounds(cu_seqlens)[-1] // size
        return with_bounds([0, *cuts_of(cu_seqlens, rank=rank, size=size), shard_tokens], cu_seqlens.device)

    return documents.derived(cu_seqlens, ("shard", rank, size), build)


def with_bounds(edges: list[int], device: torch.device) -> Tensor:
    """cu_seqlens int32 on the device, its bounds known on the host."""
    return documents.to_device(torch.tensor(edges, dtype=torch.int32), device)
