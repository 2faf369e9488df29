"""cu_seqlens, the boundaries of packed documents: checks, and facts derived from them once and kept on the tensor.

cu_seqlens is int32 [N+1], first 0, last T, non-decreasing; document n is tokens [cu_seqlens[n], cu_seqlens[n+1]), which
may be empty. It goes with B = 1; without it every row of B is one document.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor


def check(cu_seqlens: Optional[Tensor], *, num_rows: int, num_tokens: int) -> None:
    """Raise ValueError unless cu_seqlens can describe a [num_rows, num_tokens] batch.

    Its contents are looked at once per tensor (on an accelerator that waits for the device).
    """
    if cu_seqlens is None:
        return
    if num_rows != 1:
        raise ValueError(f"cu_seqlens goes with one row (B = 1), got B = {num_rows}; concatenate the rows")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be [N+1] with N >= 1, got shape {list(cu_seqlens.shape)}")
    edges = bounds(cu_seqlens)
    if edges[0] != 0 or edges[-1] != num_tokens or any(a > b for a, b in zip(edges, edges[1:])):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {num_tokens}, got {edges[:4]}..{edges[-2:]}")


def bounds(cu_seqlens: Tensor) -> list[int]:
    """cu_seqlens as a list on the host."""
    return derived(cu_seqlens, "bounds", cu_seqlens.tolist)


def lengths(cu_seqlens: Tensor) -> list[int]:
    """Tokens of each document that has any, on the host."""

    def build() -> list[int]:
        edges = bounds(cu_seqlens)
        return [end - start for start, end in zip(edges, edges[1:]) if end > start]

    return derived(cu_seqlens, "lengths", build)


def to_device(cu_seqlens: Tensor, device) -> Tensor:
    """cu_seqlens on the device, its bounds known on the host already: no op has to wait for the device to read them."""
    edges = bounds(cu_seqlens)
    moved = cu_seqlens.to(device, non_blocking=True)
    derived(moved, "bounds", lambda: edges)
    return moved


def derived(cu_seqlens: Tensor, key: Any, build: Callable[[], Any]) -> Any:
    """build(), or what it returned earlier for this tensor and key. All layers of a step share one cu_seqlens.

    The value lives on the tensor object, dies with it, and is dropped when the tensor is written to.
    """
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    kept = getattr(cu_seqlens, "_ops_derived", None)
    if kept is None or kept[0] != version:
        kept = (version, {})
        cu_seqlens._ops_derived = kept
    if key not in kept[1]:
        kept[1][key] = for_keeping(build)
    return kept[1][key]


def for_keeping(build: Callable[[], Any]) -> Any:
    """build(), outside of inference mode: a later call may train, and autograd saves no tensor from inside."""
    if not torch.is_inference_mode_enabled():
        return build()
    with torch.inference_mode(False):
        return build()


def document_ids(cu_seqlens: Tensor) -> Tensor:
    """Document index of each token, int64 [T]. Empty documents own no token."""

    def build() -> Tensor:
        numbers = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
        return torch.repeat_interleave(numbers, cu_seqlens.diff().long(), output_size=bounds(cu_seqlens)[-1])

    return derived(cu_seqlens, "document_ids", build)


def first_visible(cu_seqlens: Optional[Tensor], window: Optional[int], *, num_tokens: int, device) -> Tensor:
    """First key that each query sees, int64 [T]: its document's start, or the edge of its window."""
    positions = torch.arange(num_tokens, device=device)
    first = torch.zeros_like(positions)
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].to(device).long()
        first = starts[document_ids(cu_seqlens).to(device)]
    return first if window is None else torch.maximum(first, positions - (window - 1))


def non_empty(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 cu_seqlens without empty documents, int64 indices of the documents kept): kernels dislike empty ones."""

    def build() -> tuple[Tensor, Tensor]:
        edges = bounds(cu_seqlens)
        kept = [n for n, (start, end) in enumerate(zip(edges, edges[1:])) if end > start]
        compact = [0, *(edges[n + 1] for n in kept)]
        return tuple(torch.tensor(values, dtype=torch.int64, device=cu_seqlens.device) for values in (compact, kept))

    return derived(cu_seqlens, "non_empty", build)
