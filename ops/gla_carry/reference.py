"""The part of an entering state in the outputs of gated linear attention, in plain torch."""

from __future__ import annotations

import torch

from ops import documents


def gla_carry(o, q, log_decay, state_in, *, cu_seqlens=None, scale=None):
    """See ops.gla_carry."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    length = q.shape[1] if cu_seqlens is None else documents.bounds(cu_seqlens)[1]
    decay = log_decay[:, :length].to(exact).cumsum(1).exp()
    query = q[:, :length].to(exact).unflatten(2, (log_decay.shape[2], -1)) * decay[:, :, :, None] * scale
    added = torch.einsum("bthgk,hkv->bthgv", query, state_in.to(exact)).flatten(2, 3)
    return torch.cat([(o[:, :length] + added).to(o.dtype), o[:, length:]], 1)
