"""Accumulation in plain torch."""

import torch


@torch.no_grad()
def accumulate(total, part, *, add):
    """See ops.accumulate."""
    return total.add_(part) if add else total.copy_(part)
