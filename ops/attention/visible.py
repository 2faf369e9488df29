"""What each query sees and who sees each key, as two vectors: every mask of ops.attention is a band between them."""

from __future__ import annotations

from functools import lru_cache
from typing import Optional

import torch
from torch import Tensor

from ops import documents


def visible(
    cu_seqlens: Optional[Tensor], window: Optional[int], *, num_queries: int, num_tokens: int, device
) -> tuple[Tensor, Tensor]:
    """(first key that each query sees, int32 [num_queries]; last query that sees each key, -1 for none, int32
    [num_tokens]), both non-decreasing. The queries are those of the last tokens and count from 0.

    Made once for all layers of a step: kept on cu_seqlens, or for the last few lengths of whole rows.
    """
    if cu_seqlens is None:
        return _row(window, num_queries, num_tokens, device)
    key = ("attention_visible", window, num_queries, device)
    return documents.derived(cu_seqlens, key, lambda: _build(cu_seqlens, window, num_queries, num_tokens, device))


@lru_cache(maxsize=8)
def _row(window, num_queries, num_tokens, device):
    return documents.for_keeping(lambda: _build(None, window, num_queries, num_tokens, device))


def _build(cu_seqlens, window, num_queries, num_tokens, device):
    first = documents.first_visible(cu_seqlens, window, num_tokens=num_tokens, device=device)[-num_queries:]
    last = torch.searchsorted(first, torch.arange(num_tokens, device=device), right=True) - 1
    return first.to(torch.int32), last.to(torch.int32)
