"""Gated linear attention on Triton kernels that know grouped queries: host side, shared by the backends' files.

Every document is cut into segments. Forward: (1) what each segment adds to the state, from its keys and values alone;
(2) a scan over the segments of a document gives the state at every boundary; (3) each segment's outputs, block by block
of a few tokens, with the state in registers. All query heads of a group are the rows of one tile, so keys, values,
decays and the state are read and computed once. Backward mirrors it: the gradients of the states at boundaries by a
scan from the end, then dq running forward with the state, then dk, dv and the decays' gradients running backward with
its gradient. Only states at segment boundaries reach memory. No atomics: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import documents
from ops.gla import triton_backward as backward
from ops.gla import triton_forward as forward

_PRECISIONS = {
    torch.bfloat16: dict(DOT=tl.bfloat16, PRECISION="tf32"),
    torch.float16: dict(DOT=tl.float32, PRECISION="tf32"),  # decays inside a block leave its range, not tf32's
    torch.float32: dict(DOT=tl.float32, PRECISION="ieee"),
}


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched. part: of the dimension that its programs share out (key or value)."""

    part: int = 64
    num_warps: int = 8
    num_stages: int = 2


@dataclass(frozen=True)
class Tiles:
    """block_tokens: tokens a step of the kernels with queries. state_tokens: of the kernel without. segment_tokens: the
    longest segment; segments get shorter until there are num_programs of them. floor: see triton_forward.cumulated.
    kernels: how each kernel is launched, by name."""

    block_tokens: int = 16
    state_tokens: int = 64
    segment_tokens: int = 1024
    num_programs: int = 264
    scan_block: int = 512
    floor: float = -10.0
    kernels: Mapping[str, Tile] = field(default_factory=dict)

    def of(self, kernel) -> Tile:
        """The tile of a kernel."""
        return self.kernels.get(kernel.__name__, Tile())


@dataclass(frozen=True)
class Segments:
    """table int32 [M, 3]: first token, end, document. edges int32 [N + 1]: first segment of each document."""

    table: Tensor
    edges: Tensor
    num_segments: int
    num_documents: int


def cut(bounds: list[int], length: int, device) -> Segments:
    """Documents, given by their bounds, cut into segments of at most `length` tokens."""
    table, edges = [], [0]
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        table += [(t, min(t + length, end), n) for t in range(start, end, length)]
        edges.append(len(table))
    rows = torch.tensor(table or [(0, 0, 0)], dtype=torch.int32).to(device, non_blocking=True)
    return Segments(rows, torch.tensor(edges, dtype=torch.int32).to(device), len(table), len(bounds) - 1)


def segments_of(k: Tensor, cu_seqlens: Tensor | None, tiles: Tiles) -> Segments:
    """The segments of a batch [B, T, H, K]; its rows are documents where cu_seqlens is None."""
    num_tokens = k.shape[0] * k.shape[1]
    wanted = num_tokens * k.shape[2] / tiles.num_programs
    length = tiles.state_tokens
    while length < min(wanted, tiles.segment_tokens):
        length *= 2
    if cu_seqlens is None:
        return cut([row * k.shape[1] for row in range(k.shape[0] + 1)], length, k.device)
    key = ("gla_segments", length, k.device)
    return documents.derived(cu_seqlens, key, lambda: cut(documents.bounds(cu_seqlens), length, k.device))


def gla(q, k, v, log_decay, *, scale, initial_state, cu_seqlens, output_final_state, tiles: Tiles):
    """See ops.gla."""
    segments = segments_of(k, cu_seqlens, tiles)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, final = _Gla.apply(q, k, v, log_decay, initial_state, scale, segments, output_final_state, tiles)
    return o, final if output_final_state else None


def gla_output(q, k, v, log_decay, state_in, *, scale, cu_seqlens, tiles: Tiles):
    """See ops.gla_output: the state enters the first document alone."""
    num_documents = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    states = torch.cat([state_in[None], state_in.new_zeros(num_documents - 1, *state_in.shape)])
    how = dict(scale=scale, initial_state=states, cu_seqlens=cu_seqlens, output_final_state=False)
    return gla(q, k, v, log_decay, **how, tiles=tiles)[0]


class _Gla(torch.autograd.Function):
    """(o, final states [N, H, K, V])."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, scale, segments, output_final_state, tiles):
        q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
        launch = _Launch(q, k, v, segments, scale, tiles)
        states, totals = launch.states(k, v, log_decay, initial_state)
        o = launch.outputs(q, k, v, log_decay, states)
        ctx.save_for_backward(q, k, v, log_decay, states, totals)
        ctx.launch, ctx.given = launch, initial_state is not None
        final = launch.last(states) if output_final_state else None
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, log_decay, states, totals = ctx.saved_tensors
        do = do.contiguous()
        launch = ctx.launch
        grads = launch.state_gradients(q, log_decay, do, totals, dfinal)
        dq, dk, dv, dg = launch.gradients(q, k, v, log_decay, do, states, grads)
        dinitial = launch.first(grads) if ctx.given and ctx.needs_input_grad[4] else None
        return dq, dk, dv, dg, dinitial, None, None, None, None


class _Launch:
    """The kernels on one set of shapes and segments."""

    def __init__(self, q, k, v, segments: Segments, scale: float, tiles: Tiles):
        self.segments, self.scale, self.tiles = segments, scale, tiles
        self.heads, self.key_size, self.value_size = k.shape[2], k.shape[3], v.shape[3]
        group = q.shape[2] // k.shape[2]
        self.whole = [max(16, triton.next_power_of_2(n)) for n in (self.key_size, self.value_size)]
        self.sizes = dict(H=self.heads, K=self.key_size, V=self.value_size)
        self.grouped = dict(
            self.sizes, G=group, P=triton.next_power_of_2(group), C=tiles.block_tokens, **_PRECISIONS[q.dtype]
        )

    def _boundaries(self, like: Tensor) -> Tensor:
        num = self.segments.num_segments + self.segments.num_documents
        return like.new_empty(num, self.heads, self.key_size, self.value_size, dtype=torch.float32)

    def _run(self, kernel, *tensors, split: str, **sizes) -> None:
        """Launch over segments, heads and parts of `split`, the key or the value dimension."""
        blocks = dict(zip(("BK", "BV"), self.whole))
        tile = self.tiles.of(kernel)
        blocks[split] = min(blocks[split], tile.part)
        parts = triton.cdiv(self.key_size if split == "BK" else self.value_size, blocks[split])
        if self.segments.num_segments:
            grid = (self.segments.num_segments, self.heads, parts)
            kernel[grid](*tensors, **sizes, **blocks, num_warps=tile.num_warps, num_stages=tile.num_stages)

    def _scan(self, states, totals, entering, *, reverse: bool) -> None:
        size, block = self.key_size * self.value_size, self.tiles.scan_block
        grid = (self.segments.num_documents, self.heads, triton.cdiv(size, block))
        given = entering is not None
        forward.scan_states[grid](
            states, totals, self.segments.edges, entering.float().contiguous() if given else states,
            **self.sizes, BLOCK=block, GIVEN=given, REVERSE=reverse, num_warps=4,
        )  # fmt: skip

    def states(self, k, v, log_decay, initial_state) -> tuple[Tensor, Tensor]:
        """States at all boundaries fp32 [M + N, H, K, V], and each segment's sum of log_decay [M, H, K]."""
        states = self._boundaries(k)
        totals = states.new_empty(max(self.segments.num_segments, 1), self.heads, self.key_size)
        sizes = {key: size for key, size in self.grouped.items() if key not in ("G", "P")}
        sizes["C"] = self.tiles.state_tokens
        self._run(forward.segment_states, k, v, log_decay, self.segments.table, states, totals, split="BV", **sizes)
        self._scan(states, totals, initial_state, reverse=False)
        return states, totals

    def outputs(self, q, k, v, log_decay, states) -> Tensor:
        """o [B, T, Hq, V]."""
        o = q.new_empty(*q.shape[:3], self.value_size)
        tensors = (q, k, v, log_decay, self.segments.table, states, o, self.scale)
        self._run(forward.outputs, *tensors, split="BV", FLOOR=self.tiles.floor, **self.grouped)
        return o

    def state_gradients(self, q, log_decay, do, totals, dfinal) -> Tensor:
        """Gradients of the states at all boundaries."""
        grads = self._boundaries(q)
        tensors = (q, log_decay, do, self.segments.table, grads, self.scale)
        self._run(backward.segment_gradients, *tensors, split="BV", **self.grouped)
        self._scan(grads, totals, dfinal, reverse=True)
        return grads

    def gradients(self, q, k, v, log_decay, do, states, grads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv, dlog_decay."""
        dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, log_decay))
        qdq = torch.empty_like(k, dtype=torch.float32)
        table, scale, sizes = self.segments.table, self.scale, dict(self.grouped, FLOOR=self.tiles.floor)
        tensors = (q, k, v, log_decay, do, table, states, dq, qdq, scale)
        self._run(backward.query_gradients, *tensors, split="BK", **sizes)
        tensors = (q, k, v, log_decay, do, qdq, table, states, grads, dk, dg, scale)
        self._run(backward.key_gradients, *tensors, split="BK", **sizes)
        self._run(backward.value_gradients, q, k, log_decay, do, table, grads, dv, scale, split="BV", **sizes)
        return dq, dk, dv, dg

    def _ends(self, shift: int) -> Tensor:
        edges = self.segments.edges[shift:][: self.segments.num_documents].long()
        return edges + torch.arange(len(edges), device=edges.device)

    def last(self, states: Tensor) -> Tensor:
        """States at the ends of the documents [N, H, K, V]."""
        return states.index_select(0, self._ends(1))

    def first(self, states: Tensor) -> Tensor:
        """States at the starts of the documents [N, H, K, V]."""
        return states.index_select(0, self._ends(0))
