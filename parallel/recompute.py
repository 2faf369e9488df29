"""Recomputation: drop what the forward pass computed and make it again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_replays: list[object] = []
"""One entry for each recomputed function that this process is running again."""


def recomputed(function, *args):
    """function(*args) without keeping what it computes inside. The function must not draw random numbers."""
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), _replay())
    )


def is_replay() -> bool:
    """Whether this is the second run of a recomputed function: what counts things must not count them again."""
    return bool(_replays)


@contextmanager
def _replay():
    _replays.append(None)
    try:
        yield
    finally:
        _replays.pop()


def rebuilt(made: Tensor, make: Callable[[], Tensor]):
    """Context: what is called inside keeps no copy of `made` for its backward pass, which calls make() instead.

    make must give exactly what `made` holds; nothing may write into `made`.
    """
    size, place = made.numel(), made.data_ptr()

    def pack(saved: Tensor):
        same = size > 0 and saved.data_ptr() == place and saved.numel() == size and saved.dtype == made_dtype
        return (saved.size(), saved.stride()) if same else saved

    def unpack(kept):
        if torch.is_tensor(kept):
            return kept
        with torch.no_grad():
            return make().as_strided(*kept)

    made_dtype = made.dtype
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
