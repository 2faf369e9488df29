"""Gated linear attention on Triton kernels that know grouped queries: host side, shared by the backends' files.

Every document is cut into chunks. Forward: (1) what each chunk adds to the state, from its keys and values alone; (2) a
scan over the chunks of a document gives the state that enters each; (3) each chunk's outputs. A program walks over the
query heads of its key head, so keys, values, decays and states are read and prepared once for all of them. Backward
mirrors it: what each chunk adds to the gradient of the state, a scan from the end, then dq, then dk, dv and the decays'
gradients, chunk by chunk. No atomics: the same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import documents
from ops.gla import reference
from ops.gla import triton_backward as backward
from ops.gla import triton_forward as forward
from ops.gla.triton_step import steps
from ops.launch import Launcher

STEPS = 8
"""Up to so many tokens a row, one after the other is faster than chunks."""

_PRECISIONS = {
    torch.bfloat16: dict(DOT=tl.bfloat16, PRECISION="tf32"),
    torch.float16: dict(DOT=tl.float32, PRECISION="tf32"),  # decays inside a chunk leave its range, not tf32's
    torch.float32: dict(DOT=tl.float32, PRECISION="tf32x3"),
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
    state that a program scans, scan_ahead: the chunks on their way then. kernels: how each other one is launched, by
    name; the rest as `every`."""

    chunk_tokens: int = 64
    block_tokens: int = 16
    scan_block: int = 4
    scan_ahead: int = 8
    kernels: tuple[tuple[str, Tile], ...] = ()
    every: Tile = Tile()

    def of(self, kernel) -> Tile:
        """The tile of a kernel."""
        return dict(self.kernels).get(kernel.__name__, self.every)


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


@dataclass(frozen=True)
class Implementation:
    """ops.gla with the tiles of a backend: for bf16, for heads of more than 128 numbers, for fp16 and fp32."""

    narrow: Tiles
    large: Tiles
    wide: Tiles
    largest_head: int

    def tiles(self, q: Tensor, v: Tensor) -> Tiles | None:
        """The tiles for these tensors; None where the reference must do."""
        largest = max(q.shape[3], v.shape[3])
        if q.dtype not in _PRECISIONS or largest > self.largest_head or q.shape[1] == 0:
            return None
        return self.wide if q.dtype != torch.bfloat16 else self.large if largest > 128 else self.narrow

    def gla(self, q, k, v, log_decay, *, scale=None, initial_state=None, cu_seqlens=None, output_final_state=False):
        """See ops.gla."""
        tiles, states = self.tiles(q, v), dict(initial_state=initial_state, output_final_state=output_final_state)
        if tiles is None:
            return reference.gla(q, k, v, log_decay, scale=scale, cu_seqlens=cu_seqlens, **states)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        if _is_decoding(q, k, v, log_decay, initial_state, cu_seqlens):
            o, final = _steps(q, k, v, log_decay, scale, initial_state)
        else:
            chunks = chunks_of(k, cu_seqlens, tiles.chunk_tokens)
            o, final = _Gla.apply(q, k, v, log_decay, initial_state, scale, chunks, tiles)
        return o, final if output_final_state else None

    def gla_output(self, q, k, v, log_decay, state_in, *, scale=None, cu_seqlens=None):
        """See ops.gla_output: the state enters the first document alone."""
        num_documents = 1 if cu_seqlens is None else len(cu_seqlens) - 1
        states = torch.cat([state_in[None], state_in.new_zeros(num_documents - 1, *state_in.shape)])
        return self.gla(q, k, v, log_decay, scale=scale, initial_state=states, cu_seqlens=cu_seqlens)[0]

    gla_state = staticmethod(reference.gla_state)
    """Already one matmul."""


def _is_decoding(q, k, v, log_decay, initial_state, cu_seqlens) -> bool:
    """A few tokens of each row, and no gradients wanted."""
    few = cu_seqlens is None and q.shape[1] <= STEPS
    tensors = (q, k, v, log_decay) if initial_state is None else (q, k, v, log_decay, initial_state)
    return few and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _steps(q, k, v, log_decay, scale, initial_state):
    (rows, tokens, heads, key_size), value_size = k.shape, v.shape[3]
    launch, parts = _step_launcher(tokens, q.shape[2] // heads, heads, key_size, value_size, initial_state is not None)
    q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
    o = q.new_empty(*q.shape[:3], value_size)
    ends = q.new_empty(rows, heads, key_size, value_size, dtype=torch.float32)
    given = ends if initial_state is None else initial_state.float().contiguous()
    launch((rows * parts, heads), q, k, v, log_decay, given, o, ends, scale)
    return o, ends


@cache
def _step_launcher(tokens, group, heads, key_size, value_size, given):
    whole = [max(16, triton.next_power_of_2(n)) for n in (key_size, value_size)]
    part = min(32, whole[1])
    sizes = dict(T=tokens, G=group, H=heads, K=key_size, V=value_size, BK=whole[0], PV=part, PARTS=whole[1] // part)
    return Launcher(steps, dict(sizes, GIVEN=given), num_warps=4, num_stages=1), whole[1] // part


class _Gla(torch.autograd.Function):
    """(o, final states fp32 [N, H, K, V])."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, scale, chunks, tiles):
        ctx.set_materialize_grads(False)
        q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
        kernels = Kernels(q.shape[2] // k.shape[2], *k.shape[2:], v.shape[3], q.dtype, tiles)
        added, sums = kernels.room(chunks, k), torch.empty_like(k, dtype=torch.float32)
        totals = added.new_empty(added.shape[:3])
        kernels.chunk_states(chunks, k, v, log_decay, chunks.table, sums, totals, added)
        states, final = kernels.scan(chunks, added, totals, initial_state, reverse=False)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        kernels.outputs(chunks, q, k, v, log_decay, sums, chunks.table, states, o, scale)
        ctx.save_for_backward(q, k, v, log_decay, sums, totals, states)
        ctx.kernels, ctx.chunks, ctx.scale = kernels, chunks, scale
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
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


@lru_cache(maxsize=None)
class Kernels:
    """The kernels with the sizes and tiles of one kind of call; launchers lists them all."""

    def __init__(self, group: int, heads: int, key_size: int, value_size: int, dtype: torch.dtype, tiles: Tiles):
        self.heads, self.key_size, self.value_size = heads, key_size, value_size
        self.state_dtype, self.tiles = _STATES[dtype], tiles
        self.whole = {name: max(16, triton.next_power_of_2(n)) for name, n in (("K", key_size), ("V", value_size))}
        self.sizes = dict(H=heads, K=key_size, V=value_size, BK=self.whole["K"], BV=self.whole["V"])
        self.sizes |= dict(G=group, C=tiles.chunk_tokens, R=tiles.block_tokens, **_PRECISIONS[dtype])
        self.sizes["P"] = min(triton.next_power_of_2(group), tiles.chunk_tokens // tiles.block_tokens)
        self.launchers: list[Launcher] = []
        self.chunk_states = self._of_chunks(forward.chunk_states, "V")
        self.outputs = self._of_chunks(forward.outputs, "V")
        self.chunk_gradients = self._of_chunks(backward.chunk_gradients, "V")
        self.query_gradients = self._of_chunks(backward.query_gradients, "K")
        self.key_gradients = self._of_chunks(backward.key_gradients, "K")
        self.value_gradients = self._of_chunks(backward.value_gradients, "V")
        self.scans = {flags: self._scan(*flags) for flags in product((False, True), repeat=2)}

    def _of_chunks(self, kernel, shared_out: str):
        """launch(chunks, *tensors): programs are chunks, parts of the dimension that is shared out, and heads."""
        tile = self.tiles.of(kernel)
        part = min(self.whole[shared_out], tile.part)
        parts = self.whole[shared_out] // part
        sizes = {**self.sizes, "PARTS": parts, f"P{shared_out}": part}
        run = Launcher(kernel, sizes, num_warps=tile.num_warps, num_stages=tile.num_stages)
        self.launchers.append(run)

        def launch(chunks: Chunks, *arguments) -> None:
            if chunks.num_chunks:
                run((chunks.num_chunks * parts, self.heads), *arguments)

        return launch

    def _scan(self, given: bool, reverse: bool):
        sizes = {**self.sizes, "BLOCK": self.tiles.scan_block, "AHEAD": self.tiles.scan_ahead}
        sizes |= {"GIVEN": given, "REVERSE": reverse}
        self.launchers.append(Launcher(forward.scan_states, sizes, num_warps=4, num_stages=1))
        return self.launchers[-1]

    def scan(self, chunks: Chunks, added, totals, given, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """(what enters each chunk [M, H, K, V], what is behind the last of each document fp32 [N, H, K, V])."""
        states = torch.empty_like(added, dtype=self.state_dtype)
        ends = added.new_empty(chunks.num_documents, *added.shape[1:])
        grid = (chunks.num_documents, self.heads, triton.cdiv(self.key_size, self.tiles.scan_block))
        entering = ends if given is None else given.float().contiguous()
        self.scans[given is not None, reverse](grid, added, totals, chunks.edges, entering, states, ends)
        return states, ends

    def room(self, chunks: Chunks, like: Tensor) -> Tensor:
        """Room for a state fp32 of every chunk [M, H, K, V]."""
        shape = (max(chunks.num_chunks, 1), self.heads, self.key_size, self.value_size)
        return like.new_empty(shape, dtype=torch.float32)
