"""The kernels of ops.gla with their tiles: what to launch for tensors of given sizes and dtype."""

from __future__ import annotations

from itertools import product
from typing import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.gla import triton_backward as backward
from ops.gla import triton_forward as forward
from ops.gla.triton_step import steps
from ops.launch import Launcher

DTYPES = {
    torch.bfloat16: dict(DOT=tl.bfloat16, PRECISION="tf32"),
    torch.float16: dict(DOT=tl.float32, PRECISION="tf32"),  # decays inside a chunk leave its range, not tf32's
    torch.float32: dict(DOT=tl.float32, PRECISION="tf32x3"),
}
SHARED_OUT = {
    forward.chunk_states: "V",
    forward.outputs: "V",
    backward.chunk_gradients: "V",
    backward.query_gradients: "K",
    backward.key_gradients: "K",
    backward.value_gradients: "V",
}
"""Which dimension a chunk's programs share out."""

LARGE_HEAD = 128
"""Heads of more numbers have tiles of their own."""


def padded(size: int) -> int:
    """A size as Triton can have it in a product."""
    return max(16, triton.next_power_of_2(size))


class Kernels:
    """The kernels on chunks as methods named like them: chunk_states(chunks, *tensors). launchers: all of them."""

    def __init__(
        self, group: int, heads: int, key_size: int, value_size: int, dtype: torch.dtype, entries: Mapping[str, Mapping]
    ):
        self.heads, self.key_size, self.value_size = heads, key_size, value_size
        self.state_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.whole = {"K": padded(key_size), "V": padded(value_size)}
        self.entries, self.every = entries, None
        if dtype != torch.bfloat16:
            self.every = entries["wide"]
        elif max(key_size, value_size) > LARGE_HEAD:
            self.every = entries["large"]
        self.chunk_tokens, rows = (self.every or entries["chunks"])["C"], entries["chunks"]["R"]
        self.sizes = dict(H=heads, G=group, K=key_size, V=value_size, BK=self.whole["K"], BV=self.whole["V"])
        self.sizes |= dict(C=self.chunk_tokens, R=rows, **DTYPES[dtype])
        self.sizes["P"] = min(triton.next_power_of_2(max(group, 1)), self.chunk_tokens // rows)
        self.launchers: list[Launcher] = []
        for kernel in SHARED_OUT:
            setattr(self, kernel.__name__, self._of_chunks(kernel))
        self.scans = {flags: self._scan(*flags) for flags in product((False, True), repeat=2)}

    def _of_chunks(self, kernel):
        """launch(chunks, *tensors): programs are chunks, parts of the dimension that is shared out, and heads."""
        name = SHARED_OUT[kernel]
        tile = self.every or self.entries[kernel.__name__]
        part = min(self.whole[name], tile["PART" if self.every else f"P{name}"])
        parts = self.whole[name] // part
        launcher = Launcher(kernel, {**self.sizes, "PARTS": parts, f"P{name}": part}, tile)
        self.launchers.append(launcher)

        def launch(chunks, *arguments) -> None:
            if chunks.num_chunks:
                launcher((chunks.num_chunks * parts, self.heads), *arguments)

        return launch

    def _scan(self, given: bool, reverse: bool) -> Launcher:
        tile = self.entries["scan_states"]
        self.launchers.append(Launcher(forward.scan_states, {**self.sizes, "GIVEN": given, "REVERSE": reverse}, tile))
        return self.launchers[-1]

    def added(self, chunks, k, v, log_decay) -> tuple[Tensor, Tensor, Tensor]:
        """(sums of log_decay inside chunks, their totals [M, H, K], what chunks add to the state [M, H, K, V])."""
        added, sums = self.room(chunks, k), torch.empty_like(k, dtype=torch.float32)
        totals = added.new_empty(added.shape[:3])
        self.chunk_states(chunks, k, v, log_decay, chunks.table, sums, totals, added)
        return sums, totals, added

    def scan(self, chunks, added, totals, given, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """(what enters each chunk [M, H, K, V], what is behind the last of each document fp32 [N, H, K, V])."""
        states = torch.empty_like(added, dtype=self.state_dtype)
        ends = added.new_empty(chunks.num_documents, *added.shape[1:])
        grid = (chunks.num_documents, self.heads, triton.cdiv(self.key_size, self.entries["scan_states"]["BLOCK"]))
        entering = ends if given is None else given.float().contiguous()
        self.scans[given is not None, reverse](grid, added, totals, chunks.edges, entering, states, ends)
        return states, ends

    def room(self, chunks, like: Tensor) -> Tensor:
        """Room for a state fp32 of every chunk [M, H, K, V]."""
        shape = (max(chunks.num_chunks, 1), self.heads, self.key_size, self.value_size)
        return like.new_empty(shape, dtype=torch.float32)


class Steps:
    """The kernel for a few tokens, called like ops.gla."""

    def __init__(self, group, heads, key_size, value_size, dtype, num_tokens: int, given: bool, entries: Mapping):
        whole, tile = [padded(key_size), padded(value_size)], entries["steps"]
        part = min(tile["PV"], whole[1])
        self.parts = whole[1] // part
        sizes = dict(T=num_tokens, H=heads, G=group, K=key_size, V=value_size, BK=whole[0], PARTS=self.parts)
        self.launcher = Launcher(steps, {**sizes, "PV": part, "GIVEN": given}, tile)

    def __call__(self, q, k, v, log_decay, initial_state, scale: float) -> tuple[Tensor, Tensor]:
        (rows, _, heads, key_size), value_size = k.shape, v.shape[3]
        q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
        o = q.new_empty(*q.shape[:3], value_size)
        ends = q.new_empty(rows, heads, key_size, value_size, dtype=torch.float32)
        given = ends if initial_state is None else initial_state.float().contiguous()
        self.launcher((rows * self.parts, heads), q, k, v, log_decay, given, o, ends, scale)
        return o, ends
