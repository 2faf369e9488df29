"""Gated linear attention on NVIDIA GPUs with the chunk kernels of flash-linear-attention (fla-core 0.6).

Those kernels know no grouped queries: keys, values and decays are repeated to the query heads (autograd sums their
gradients back over the group), and of a group's equal states the first is returned. They multiply fp32 inputs in tf32,
so inputs other than bf16 and fp16 go to the reference.

Packed documents without states of their own run as one row whose decay at each document's first token is exp(-128) = 0
in fp32: no ragged chunks, and nothing to wait for on the host.
"""

from __future__ import annotations

import torch
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from torch import Tensor

from ops import documents
from ops.gla import reference

DTYPES = (torch.bfloat16, torch.float16)
RESET = -128.0


def gla(q, k, v, log_decay, *, scale=None, initial_state=None, cu_seqlens=None, output_final_state=False):
    """See ops.gla."""
    if q.dtype not in DTYPES or q.shape[1] == 0:
        return reference.gla(
            q,
            k,
            v,
            log_decay,
            scale=scale,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            output_final_state=output_final_state,
        )
    single = cu_seqlens is None or len(cu_seqlens) == 2
    if single or not (output_final_state or initial_state is not None):
        log_decay = _reset(log_decay, cu_seqlens)
        return _run(q, k, v, log_decay, scale, initial_state, None, output_final_state)
    return _stateful(q, k, v, log_decay, scale, initial_state, cu_seqlens, output_final_state)


def gla_output(q, k, v, log_decay, state_in, *, scale=None, cu_seqlens=None):
    """See ops.gla_output."""
    if q.dtype not in DTYPES or q.shape[1] == 0:
        return reference.gla_output(q, k, v, log_decay, state_in, scale=scale, cu_seqlens=cu_seqlens)
    return _run(q, k, v, _reset(log_decay, cu_seqlens), scale, state_in[None], None, False)[0]


gla_state = reference.gla_state
"""Already one matmul."""


def _reset(log_decay: Tensor, cu_seqlens) -> Tensor:
    """log_decay with RESET at the first token of every document but document 0, whose state enters from the left."""
    if cu_seqlens is None or len(cu_seqlens) == 2:
        return log_decay

    def build() -> Tensor:
        starts = torch.zeros(log_decay.shape[1] + 1, dtype=torch.bool, device=log_decay.device)
        return starts.index_fill_(0, cu_seqlens[1:-1].to(starts.device).long(), True)[:-1, None, None]

    return log_decay.masked_fill(documents.derived(cu_seqlens, "gla_starts", build), RESET)


def _stateful(q, k, v, log_decay, scale, initial_state, cu_seqlens, output_final_state):
    """Documents with states of their own. Empty ones are left out of the kernel call; their state passes unchanged."""
    compact, kept = documents.non_empty(cu_seqlens)
    entering = None if initial_state is None else initial_state.index_select(0, kept)
    o, final = _run(q, k, v, log_decay, scale, entering, compact, output_final_state)
    if final is not None and len(final) < len(cu_seqlens) - 1:
        if initial_state is None:
            initial_state = final.new_zeros(len(cu_seqlens) - 1, *final.shape[1:])
        final = initial_state.to(final.dtype).index_copy(0, kept, final)
    return o, final


def _run(q, k, v, log_decay, scale, initial_state, cu_seqlens, output_final_state):
    group = q.shape[2] // k.shape[2]
    k, v, log_decay = (x.repeat_interleave(group, 2) for x in (k, v, log_decay.float()))
    if initial_state is not None:
        initial_state = initial_state.float().repeat_interleave(group, 1)
    kernel = fused_recurrent_gla if q.shape[1] == 1 else chunk_gla
    o, final = kernel(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
    return o, final[:, ::group] if output_final_state else None
