"""Recomputation: drop a function's activations after the forward pass and run it again in the backward pass."""

from __future__ import annotations

from torch.utils.checkpoint import checkpoint


def recomputed(function, *args):
    """function(*args) without keeping what it computes inside. The function must not draw random numbers."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
