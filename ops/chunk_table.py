"""Documents cut into chunks for kernels: which tokens each program has. Chunks never cross a document's boundary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Optional

import torch
from torch import Tensor

from ops import documents


@dataclass(frozen=True)
class ChunkTable:
    """table int32 [M, 2]: first token and end. bounds, edges int32 [N + 1]: first token, first chunk of documents."""

    table: Tensor
    bounds: Tensor
    edges: Tensor
    num_chunks: int
    num_documents: int


def chunk_table(x: Tensor, cu_seqlens: Optional[Tensor], length: int) -> ChunkTable:
    """The chunks of at most `length` tokens of a batch x [B, T, ...] on its device, in order.

    Its rows are documents where cu_seqlens is None. Kept for later calls: all layers of a step share one.
    """
    if cu_seqlens is None:
        return _of_rows(*x.shape[:2], length, x.device)
    key = ("chunk_table", length, x.device)
    return documents.derived(cu_seqlens, key, lambda: _cut(documents.bounds(cu_seqlens), length, x.device))


@lru_cache(maxsize=16)
def _of_rows(num_rows: int, num_tokens: int, length: int, device) -> ChunkTable:
    return documents.for_keeping(lambda: _cut([row * num_tokens for row in range(num_rows + 1)], length, device))


def _cut(bounds: list[int], length: int, device) -> ChunkTable:
    table, edges = [], [0]
    for start, end in zip(bounds, bounds[1:]):
        table += [(t, min(t + length, end)) for t in range(start, end, length)]
        edges.append(len(table))
    rows = (table or [(0, 0)], bounds, edges)
    tensors = (torch.tensor(x, dtype=torch.int32).to(device, non_blocking=True) for x in rows)
    return ChunkTable(*tensors, len(table), len(bounds) - 1)
