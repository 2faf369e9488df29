"""Gated linear attention on Triton kernels that know grouped queries: host side, shared by the backends' files.

Every document is cut into chunks. Forward: (1) what each chunk adds to the state, from its keys and values alone; (2) a
scan over the chunks of a document gives the state that enters each; (3) each chunk's outputs. A program walks over the
query heads of its key head, so keys, values, decays and states are read and prepared once for all of them. Backward
mirrors it: what each chunk adds to the gradient of the state, a scan from the end, then dq, then dk and the decays'
gradients, then dv, chunk by chunk. No atomics: the same bits every time. A few tokens without gradients, as in
decoding, go one after the other instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import documents
from ops.chunk_table import chunk_table
from ops.gla import reference
from ops.gla.kernels import DTYPES, Kernels, Steps
from ops.launch import Prepared

STEPS = 8
"""Up to so many tokens a row, one after the other is faster than chunks."""


class Implementation:
    """ops.gla with the tiles of a backend."""

    def __init__(self, backend: str, *, largest_head: int):
        self.largest_head = largest_head
        self.prepared = Prepared("gla", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.gla, self.gla_output, self.gla_state

    def accepts(self, name: str, first: Tensor, *rest, **options) -> str | None:
        """Why a call cannot run here, from its tensors' dtypes and shapes; None when it can."""
        value = rest[0] if name == "gla_state" else rest[1]
        if first.dtype not in DTYPES:
            return "takes bf16, fp16 and fp32"
        if max(first.shape[3], value.shape[3]) > self.largest_head:
            return f"takes heads of up to {self.largest_head} numbers"
        return None

    def gla(self, q, k, v, log_decay, *, scale=None, initial_state=None, cu_seqlens=None, output_final_state=False):
        """See ops.gla."""
        if q.shape[1] == 0:
            states = dict(initial_state=initial_state, output_final_state=output_final_state)
            return reference.gla(q, k, v, log_decay, scale=scale, cu_seqlens=cu_seqlens, **states)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        sizes = (q.shape[2] // k.shape[2], *k.shape[2:], v.shape[3], q.dtype)
        if _is_decoding(q, k, v, log_decay, initial_state, cu_seqlens):
            steps = self.prepared(Steps, *sizes, q.shape[1], initial_state is not None)
            o, final = steps(q, k, v, log_decay, initial_state, scale)
        else:
            kernels = self.prepared(Kernels, *sizes)
            chunks = chunk_table(k, cu_seqlens, kernels.chunk_tokens)
            o, final = _Gla.apply(q, k, v, log_decay, initial_state, scale, chunks, kernels)
        return o, final if output_final_state else None

    def gla_output(self, q, k, v, log_decay, state_in, *, scale=None, cu_seqlens=None):
        """See ops.gla_output: the state enters the first document alone."""
        num_documents = 1 if cu_seqlens is None else len(cu_seqlens) - 1
        states = torch.cat([state_in[None], state_in.new_zeros(num_documents - 1, *state_in.shape)])
        return self.gla(q, k, v, log_decay, scale=scale, initial_state=states, cu_seqlens=cu_seqlens)[0]

    def gla_state(self, k, v, log_decay, *, cu_seqlens=None):
        """See ops.gla_state: a call without queries, of which only the last document's final state is wanted."""
        start, several = 0, cu_seqlens is not None and len(cu_seqlens) > 2
        if cu_seqlens is not None:
            start = documents.bounds(cu_seqlens)[-2]
        if start == k.shape[1]:
            return reference.gla_state(k, v, log_decay, cu_seqlens=cu_seqlens)
        kernels = self.prepared(Kernels, 0, *k.shape[2:], v.shape[3], k.dtype)
        k, v, last_decays = k[:, start:], v[:, start:], log_decay[:, start:]
        state = _State.apply(k, v, last_decays, chunk_table(k, None, kernels.chunk_tokens), kernels)[0]
        total = torch.full_like(state[:, :, 0], -torch.inf) if several else log_decay[0].float().sum(0)
        return state, total


def _is_decoding(q, k, v, log_decay, initial_state, cu_seqlens) -> bool:
    """A few tokens of each row, and no gradients wanted."""
    few = cu_seqlens is None and q.shape[1] <= STEPS
    tensors = (q, k, v, log_decay) if initial_state is None else (q, k, v, log_decay, initial_state)
    return few and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


class _State(torch.autograd.Function):
    """Final states fp32 [N, H, K, V]."""

    @staticmethod
    def forward(ctx, k, v, log_decay, chunks, kernels):
        k, v, log_decay = (x.contiguous() for x in (k, v, log_decay))
        sums, totals, added = kernels.added(chunks, k, v, log_decay)
        states, final = kernels.scan(chunks, added, totals, None, reverse=False)
        ctx.save_for_backward(k, v, log_decay, sums, totals, states)
        ctx.kernels, ctx.chunks = kernels, chunks
        return final

    @staticmethod
    @once_differentiable
    def backward(ctx, dfinal):
        k, v, log_decay, sums, totals, states = ctx.saved_tensors
        kernels, chunks = ctx.kernels, ctx.chunks
        leaving, _ = kernels.scan(chunks, torch.zeros_like(states, dtype=torch.float32), totals, dfinal, reverse=True)
        dk, dv, dg = (torch.empty_like(x) for x in (k, v, log_decay))
        inputs, qdq = (k, k, v, log_decay, sums, v), torch.zeros_like(sums)  # no query head reads the first and last
        kernels.key_gradients(chunks, *inputs, qdq, chunks.table, totals, states, leaving, dk, dg, 1.0)
        kernels.value_gradients(chunks, k, k, log_decay, sums, v, chunks.table, totals, leaving, dv, 1.0)
        return dk, dv, dg, None, None


class _Gla(torch.autograd.Function):
    """(o, final states fp32 [N, H, K, V])."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, scale, chunks, kernels):
        ctx.set_materialize_grads(False)
        q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
        sums, totals, added = kernels.added(chunks, k, v, log_decay)
        states, final = kernels.scan(chunks, added, totals, initial_state, reverse=False)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        kernels.outputs(chunks, q, k, v, log_decay, sums, chunks.table, states, o, scale)
        ctx.save_for_backward(q, k, v, log_decay, sums, totals, states)
        ctx.kernels, ctx.chunks, ctx.scale = kernels, chunks, scale
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        """Gradients of q, k, v, log_decay and the initial state; do or dfinal is None where the loss lacks it."""
        q, k, v, log_decay, sums, totals, states = ctx.saved_tensors
        kernels, chunks, scale = ctx.kernels, ctx.chunks, ctx.scale
        do = q.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do.contiguous()
        added = kernels.room(chunks, q)
        kernels.chunk_gradients(chunks, q, sums, do, chunks.table, added, scale)
        leaving, dinitial = kernels.scan(chunks, added, totals, dfinal, reverse=True)
        del added
        dq, dk, dv, dg, qdq = (torch.empty_like(x) for x in (q, k, v, log_decay, sums))
        inputs = (q, k, v, log_decay, sums, do)
        kernels.query_gradients(chunks, *inputs, chunks.table, states, dq, qdq, scale)
        kernels.key_gradients(chunks, *inputs, qdq, chunks.table, totals, states, leaving, dk, dg, scale)
        kernels.value_gradients(chunks, q, k, log_decay, sums, do, chunks.table, totals, leaving, dv, scale)
        return dq, dk, dv, dg, dinitial if ctx.needs_input_grad[4] else None, None, None, None
