"""What an entering state adds to gated linear attention, on Triton kernels: host side, shared by the backends' files.

Document 0 is cut into chunks. Forward: sums of log_decay over chunks, a scan over them, then each chunk's outputs. The
backward pass: dq and what tokens give to the decays' gradient, summed from the end in the same two steps; the state's
gradient in shares, then their sum. A chunk where the entering state has decayed to nothing costs one look. No atomics:
the same bits every time.
"""

from __future__ import annotations

from typing import Mapping

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import documents
from ops.gla.kernels import DTYPES, LARGE_HEAD, padded
from ops.gla_carry import triton_kernels
from ops.launch import Launcher, Prepared

SHARED_OUT = {"add_state": "V", "query_gradients": "K", "state_gradients": "V"}
"""Which dimension a chunk's programs share out."""


class Implementation:
    """ops.gla_carry with the tiles of a backend."""

    def __init__(self, backend: str, *, largest_head: int):
        self.largest_head = largest_head
        self.prepared = Prepared("gla_carry", backend)

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.gla_carry

    def accepts(self, name: str, o: Tensor, q: Tensor, *rest, **options) -> str | None:
        """Why a call cannot run here, from its tensors' dtypes and shapes; None when it can."""
        if q.dtype not in DTYPES or o.dtype not in DTYPES:
            return "takes bf16, fp16 and fp32"
        if max(q.shape[3], o.shape[3]) > self.largest_head:
            return f"takes heads of up to {self.largest_head} numbers"
        return None

    def gla_carry(self, o, q, log_decay, state_in, *, cu_seqlens=None, scale=None):
        """See ops.gla_carry."""
        length = q.shape[1] if cu_seqlens is None else documents.bounds(cu_seqlens)[1]
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        heads = log_decay.shape[2]
        kernels = self.prepared(Kernels, q.shape[2] // heads, heads, q.shape[3], o.shape[3], q.dtype)
        if not _may_be_overwritten(o):
            o = o.clone(memory_format=torch.contiguous_format)
        return _Carry.apply(o, q, log_decay, state_in, length, scale, kernels)


def _may_be_overwritten(o: Tensor) -> bool:
    """Not what others see parts of, nor what autograd guards: a leaf that gets a gradient."""
    guarded = o.is_leaf and o.requires_grad and torch.is_grad_enabled()
    return o.is_contiguous() and not o._is_view() and not guarded


class _Carry(torch.autograd.Function):
    """o, written in place."""

    @staticmethod
    def forward(ctx, o, q, log_decay, state_in, length, scale, kernels):
        q, log_decay, state_in = q.contiguous(), log_decay.contiguous(), state_in.float().contiguous()
        before = kernels.add(o, q, log_decay, state_in, length, scale)
        ctx.mark_dirty(o)
        ctx.save_for_backward(q, log_decay, state_in, before)
        ctx.kernels, ctx.length, ctx.scale = kernels, length, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, log_decay, state_in, before = ctx.saved_tensors
        kernels, shape, grads = ctx.kernels, (ctx.length, ctx.scale), do.contiguous()
        dq = dg = dstate = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dq, dg = kernels.token_gradients(grads, q, log_decay, state_in, before, *shape)
        if ctx.needs_input_grad[3]:
            dstate = kernels.state_gradient(grads, q, log_decay, before, *shape)
        return do, dq, dg, dstate, None, None, None


class Kernels:
    """The kernels for tensors of given sizes and dtype. launchers: all of them, by name."""

    def __init__(
        self, group: int, heads: int, key_size: int, value_size: int, dtype: torch.dtype, entries: Mapping[str, Mapping]
    ):
        self.heads, self.key_size, self.value_size = heads, key_size, value_size
        whole, every = {"K": padded(key_size), "V": padded(value_size)}, None
        if dtype != torch.bfloat16:
            every = entries["wide"]
        elif max(key_size, value_size) > LARGE_HEAD:
            every = entries["large"]
        self.chunk_tokens, self.scan_block = (every or entries["chunks"])["C"], entries["scan_sums"]["BLOCK"]
        sizes = dict(H=heads, G=group, K=key_size, V=value_size, BK=whole["K"], BV=whole["V"], C=self.chunk_tokens)
        sizes |= DTYPES[dtype]
        self.shares = max(1, entries["chunks"]["PROGRAMS"] // heads)
        self.parts, self.launchers = {}, {}
        for name, axis in SHARED_OUT.items():
            tile = every or entries[name]
            part = min(whole[axis], tile["PART" if every else f"P{axis}"])
            self.parts[name] = whole[axis] // part
            constants = {**sizes, f"P{axis}": part, "PARTS": self.parts[name], "SHARES": self.shares}
            self.launchers[name] = Launcher(getattr(triton_kernels, name), constants, tile)
        for name in ("chunk_sums", "decay_gradients"):
            self.launchers[name] = Launcher(getattr(triton_kernels, name), sizes, entries[name])
        for name, reverse in (("before", False), ("after", True)):
            constants = {**sizes, "REVERSE": reverse}
            self.launchers[name] = Launcher(triton_kernels.scan_sums, constants, entries["scan_sums"])

    def add(self, o, q, log_decay, state, length: int, scale: float) -> Tensor:
        """Add the state's part to o; returns the sums of log_decay before each chunk, fp32 [M, H, K]."""
        num_chunks, sums = self._sums(q, length)
        if num_chunks == 0:
            return sums
        self.launchers["chunk_sums"]((num_chunks, self.heads), log_decay, sums, length)
        before = self._scanned("before", sums)
        self._of_chunks("add_state", num_chunks, o, q, log_decay, before, state, length, scale)
        return before

    def token_gradients(self, do, q, log_decay, state, before, length: int, scale: float) -> tuple[Tensor, Tensor]:
        """(dq, gradient of log_decay); 0 where the state does not reach, which no kernel writes."""
        dq, dg = torch.zeros_like(q), torch.zeros_like(log_decay)
        num_chunks, sums = self._sums(q, length)
        if num_chunks == 0:
            return dq, dg
        inside = torch.empty_like(log_decay, dtype=torch.float32)
        inputs = (q, do, log_decay, before, state)
        self._of_chunks("query_gradients", num_chunks, *inputs, dq, inside, sums, length, scale)
        after = self._scanned("after", sums)
        self.launchers["decay_gradients"]((num_chunks, self.heads), before, inside, after, dg, length)
        return dq, dg

    def state_gradient(self, do, q, log_decay, before, length: int, scale: float) -> Tensor:
        """The gradient of state_in, fp32 [H, K, V]."""
        num_chunks = len(before)
        num_shares = min(self.shares, num_chunks)
        shares = q.new_empty(num_shares, self.heads, self.key_size, self.value_size, dtype=torch.float32)
        if num_chunks:
            arguments = (q, do, log_decay, before, shares, length, num_chunks, scale)
            self._of_chunks("state_gradients", num_shares, *arguments)
        return shares.sum(0)

    def _of_chunks(self, name: str, num_chunks: int, *arguments) -> None:
        self.launchers[name]((num_chunks * self.parts[name], self.heads), *arguments)

    def _sums(self, q: Tensor, length: int) -> tuple[int, Tensor]:
        """(number of chunks M, room for a sum of each [M, H, K])."""
        num_chunks = triton.cdiv(length, self.chunk_tokens)
        return num_chunks, q.new_empty(num_chunks, self.heads, self.key_size, dtype=torch.float32)

    def _scanned(self, name: str, sums: Tensor) -> Tensor:
        others = torch.empty_like(sums)
        grid = (triton.cdiv(self.heads * self.key_size, self.scan_block),)
        self.launchers[name](grid, sums, others, len(sums))
        return others
