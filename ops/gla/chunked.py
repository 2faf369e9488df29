"""Gated linear attention on Triton kernels that know grouped queries: host side, shared by the backends' files.

Every document is cut into chunks. Forward: (1) what each chunk adds to the state, from its keys and values alone; (2) a
scan over the chunks of a document gives the state that enters each; (3) each chunk's outputs. A program walks over the
query heads of its key head, so keys, values, decays and states are read and prepared once for all of them. Backward
mirrors it: what each chunk adds to the gradient of the state, a scan from the end, then dq, then dk, dv and the decays'
gradients, chunk by chunk. No atomics: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import documents
from ops.gla import triton_backward as backward
from ops.gla import triton_forward as forward

_PRECISIONS = {
    torch.bfloat16: dict(DOT=tl.bfloat16, PRECISION="tf32"),
    torch.float16: dict(DOT=tl.float32, PRECISION="tf32"),  # decays inside a chunk leave its range, not tf32's
    torch.float32: dict(DOT=tl.float32, PRECISION="ieee"),
}
_STATES = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}
"""In what the states between chunks are kept; the scan itself is fp32."""


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched. part: of the dimension that its programs share out (key or value)."""

    part: int = 128
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Tiles:
    """chunk_tokens: the longest chunk. block_tokens: queries at a time where decays are strong. scan_block: rows of a
    state that a program scans, scan_ahead: the chunks on their way then. kernels: how each other one is launched."""

    chunk_tokens: int = 64
    block_tokens: int = 16
    scan_block: int = 4
    scan_ahead: int = 8
    kernels: Mapping[str, Tile] = field(default_factory=dict)

    def of(self, kernel) -> Tile:
        """The tile of a kernel."""
        return self.kernels.get(kernel.__name__, Tile())


@dataclass(frozen=True)
class Chunks:
    """table int32 [M, 3]: first token, end, document. edges int32 [N + 1]: first chunk of each document."""

    table: Tensor
    edges: Tensor
    num_chunks: int
    num_documents: int


def cut(bounds: list[int], length: int, device) -> Chunks:
    """Documents, given by their bounds, cut into chunks of at most `length` tokens."""
    table, edges = [], [0]
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        table += [(t, min(t + length, end), n) for t in range(start, end, length)]
        edges.append(len(table))
    rows = torch.tensor(table or [(0, 0, 0)], dtype=torch.int32).to(device, non_blocking=True)
    return Chunks(rows, torch.tensor(edges, dtype=torch.int32).to(device), len(table), len(bounds) - 1)


@lru_cache(maxsize=16)
def _cut_rows(num_rows: int, num_tokens: int, length: int, device) -> Chunks:
    return cut([row * num_tokens for row in range(num_rows + 1)], length, device)


def chunks_of(k: Tensor, cu_seqlens: Tensor | None, length: int) -> Chunks:
    """The chunks of a batch [B, T, H, K]; its rows are documents where cu_seqlens is None."""
    if cu_seqlens is None:
        return _cut_rows(*k.shape[:2], length, k.device)
    key = ("gla_chunks", length, k.device)
    return documents.derived(cu_seqlens, key, lambda: cut(documents.bounds(cu_seqlens), length, k.device))


def gla(q, k, v, log_decay, *, scale, initial_state, cu_seqlens, output_final_state, tiles: Tiles):
    """See ops.gla."""
    chunks = chunks_of(k, cu_seqlens, tiles.chunk_tokens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, final = _Gla.apply(q, k, v, log_decay, initial_state, scale, chunks, tiles)
    return o, final if output_final_state else None


def gla_output(q, k, v, log_decay, state_in, *, scale, cu_seqlens, tiles: Tiles):
    """See ops.gla_output: the state enters the first document alone."""
    num_documents = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    states = torch.cat([state_in[None], state_in.new_zeros(num_documents - 1, *state_in.shape)])
    how = dict(scale=scale, initial_state=states, cu_seqlens=cu_seqlens, output_final_state=False)
    return gla(q, k, v, log_decay, **how, tiles=tiles)[0]


class _Gla(torch.autograd.Function):
    """(o, final states fp32 [N, H, K, V])."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, scale, chunks, tiles):
        ctx.set_materialize_grads(False)
        q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
        launch = _Launch(q, k, v, chunks, scale, tiles)
        sums, totals, states, final = launch.states(k, v, log_decay, initial_state)
        o = launch.outputs(q, k, v, log_decay, sums, states)
        ctx.save_for_backward(q, k, v, log_decay, sums, totals, states)
        ctx.launch = launch
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, log_decay, sums, totals, states = ctx.saved_tensors
        do = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]) if do is None else do
        do, launch = do.contiguous(), ctx.launch
        leaving, dinitial = launch.state_gradients(q, sums, totals, do, dfinal)
        grads = launch.gradients(q, k, v, log_decay, sums, totals, do, states, leaving)
        return *grads, dinitial if ctx.needs_input_grad[4] else None, None, None, None


class _Launch:
    """The kernels on one set of shapes and chunks."""

    def __init__(self, q, k, v, chunks: Chunks, scale: float, tiles: Tiles):
        self.chunks, self.scale, self.tiles = chunks, scale, tiles
        self.heads, self.key_size, self.value_size = k.shape[2], k.shape[3], v.shape[3]
        self.whole = [max(16, triton.next_power_of_2(n)) for n in (self.key_size, self.value_size)]
        self.state_dtype = _STATES[q.dtype]
        self.sizes = dict(H=self.heads, K=self.key_size, V=self.value_size)
        group = q.shape[2] // k.shape[2]
        self.constants = dict(
            self.sizes,
            G=group,
            P=min(triton.next_power_of_2(group), tiles.chunk_tokens // tiles.block_tokens),
            BK=self.whole[0],
            BV=self.whole[1],
            C=tiles.chunk_tokens,
            R=tiles.block_tokens,
            **_PRECISIONS[q.dtype],
        )

    def _run(self, kernel, *tensors) -> None:
        """Launch over chunks, parts and heads."""
        tile, sizes = self.tiles.of(kernel), self.constants
        parts = [min(size, tile.part) for size in self.whole]
        sizes = dict(sizes, PK=parts[0], PV=parts[1])
        shared_out = [size // part for size, part, name in zip(self.whole, parts, ("PK", "PV")) if name in _names(kernel)]
        sizes["PARTS"] = max(shared_out)
        if self.chunks.num_chunks:
            kernel[(self.chunks.num_chunks * sizes["PARTS"], self.heads)](
                *tensors,
                **{name: value for name, value in sizes.items() if name in _names(kernel)},
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )

    def _scan(self, added, totals, given, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """(what enters each chunk [M, H, K, V], what is behind the last of each document fp32 [N, H, K, V])."""
        states = torch.empty_like(added, dtype=self.state_dtype)
        ends = added.new_empty(self.chunks.num_documents, *added.shape[1:])
        block, given_states = self.tiles.scan_block, ends if given is None else given.float().contiguous()
        forward.scan_states[(self.chunks.num_documents, self.heads, triton.cdiv(self.key_size, block))](
            added, totals, self.chunks.edges, given_states, states, ends,
            **self.sizes, BLOCK=block, BV=self.whole[1], AHEAD=self.tiles.scan_ahead, GIVEN=given is not None,
            REVERSE=reverse, num_warps=4,
        )  # fmt: skip
        return states, ends

    def _states(self, like: Tensor) -> Tensor:
        num_chunks = max(self.chunks.num_chunks, 1)
        return like.new_empty(num_chunks, self.heads, self.key_size, self.value_size, dtype=torch.float32)

    def states(self, k, v, log_decay, initial_state) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(sums of log_decay inside chunks, chunks' totals, states that enter chunks, final states)."""
        added, sums = self._states(k), torch.empty_like(k, dtype=torch.float32)
        totals = added.new_empty(added.shape[:3])
        self._run(forward.chunk_states, k, v, log_decay, self.chunks.table, sums, totals, added)
        return sums, totals, *self._scan(added, totals, initial_state, reverse=False)

    def outputs(self, q, k, v, log_decay, sums, states) -> Tensor:
        """o [B, T, Hq, V]."""
        o = q.new_empty(*q.shape[:3], self.value_size)
        self._run(forward.outputs, q, k, v, log_decay, sums, self.chunks.table, states, o, self.scale)
        return o

    def state_gradients(self, q, sums, totals, do, dfinal) -> tuple[Tensor, Tensor]:
        """Gradients of the states behind chunks, and of the initial states."""
        added = self._states(q)
        self._run(backward.chunk_gradients, q, sums, do, self.chunks.table, added, self.scale)
        return self._scan(added, totals, dfinal, reverse=True)

    def gradients(self, q, k, v, log_decay, sums, totals, do, states, leaving) -> tuple[Tensor, ...]:
        """dq, dk, dv, dlog_decay."""
        dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, log_decay))
        qdq, table = torch.empty_like(sums), self.chunks.table
        tensors = (q, k, v, log_decay, sums, do, table, states, dq, qdq, self.scale)
        self._run(backward.query_gradients, *tensors)
        tensors = (q, k, v, log_decay, sums, do, qdq, table, totals, states, leaving, dk, dg, self.scale)
        self._run(backward.key_gradients, *tensors)
        self._run(backward.value_gradients, q, k, log_decay, sums, do, table, totals, leaving, dv, self.scale)
        return dq, dk, dv, dg


@lru_cache(maxsize=None)
def _names(kernel) -> frozenset:
    return frozenset(kernel.arg_names)
