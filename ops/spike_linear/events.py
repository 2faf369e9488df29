"""A linear layer as spikes drive it: integer weights added where and when a spike arrives, and nothing multiplied.

What it returns is count @ weight.T exactly, for every coding: the proof that the products of ops.spike_linear compute
what event-driven hardware would. Source: SpikingBrain report, section 3.3. A reference: its time grows with the spikes.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ops.spike_encode import spike_encode
from ops.spike_encode.steps import COUNTED

ADDED_NUMBERS = 2**22
"""Most numbers that one gathering of weights holds."""


def spike_linear_events(
    count: Tensor, weight: Tensor, *, encoding: str, group: Optional[int] = None, lsb_first: bool = False
) -> Tensor:
    """Sums int64 [..., F] of count [..., D] and weight int8 [F, D]; with group [..., F, D / group], one for each scale.

    count is coded by ops.spike_encode. At every time step the weights of the channels that fire are added, or for a
    spike of -1 subtracted; between the steps of a coding of bits the sums are doubled, or with lsb_first the weights
    are. The step of two's complement's sign is subtracted. Without channels there are no groups.
    Raises ValueError on shapes and dtypes that do not fit, and as ops.spike_encode does without num_steps.
    """
    size = weight.shape[-1]
    if weight.dim() != 2 or weight.dtype != torch.int8 or not count.dim() or count.shape[-1] != size:
        found = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"weight must be torch.int8 [F, D] for counts {list(count.shape)} of D channels, got {found}")
    if group is not None and (group < 1 or size % group):
        raise ValueError(f"group={group} must divide the {size} channels")
    num_groups = 1 if group is None else size // group
    spikes = spike_encode(count.reshape(count.shape[:-1].numel(), size), encoding=encoding, lsb_first=lsb_first)
    columns = weight.T.long()
    total = columns.new_zeros(spikes.shape[1], num_groups, len(weight))
    of_sign = len(spikes) - 1 if lsb_first else 0
    for step, fired in enumerate(spikes):
        if encoding not in COUNTED and not lsb_first:
            total += total
        _add_events(total, -fired if encoding == "twos_complement" and step == of_sign else fired, columns)
        if encoding not in COUNTED and lsb_first:
            columns = columns + columns
    total = total.transpose(1, 2).reshape(*count.shape[:-1], len(weight), num_groups)
    return total.squeeze(-1) if group is None else total


def _add_events(total: Tensor, fired: Tensor, columns: Tensor) -> None:
    """Add columns [D, F] to total [tokens, groups, F] where fired [tokens, D] is 1, subtract them where it is -1."""
    flat, num_groups = total.flatten(0, 1), total.shape[1]
    group, at_once = max(1, len(columns) // max(1, num_groups)), max(1, ADDED_NUMBERS // max(1, columns.shape[1]))
    for sign in (1, -1):
        tokens, channels = (fired == sign).nonzero(as_tuple=True)
        for rows, inputs in zip(tokens.split(at_once), channels.split(at_once)):
            flat.index_add_(0, rows * num_groups + inputs // group, columns[inputs], alpha=sign)
