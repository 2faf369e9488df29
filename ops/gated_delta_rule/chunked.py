"""Gated delta rule on Triton kernels, chunk by chunk: host side, shared by the backends' files.

Documents are cut into chunks that never cross their boundaries. Forward: (1) each chunk's errors, as a linear function
of the state that enters it (the WY representation, with one inverse of a triangular matrix); (2) the state from chunk
to chunk through each document; (3) outputs. Backward: (1) each chunk's part of the gradient of its errors; (2) the
gradient of the state from chunk to chunk, from the end; (3) gradients of all inputs. The serial kernels share out value
heads and value columns, the others chunks and heads. Kept for backward, in the inputs' dtype: inverses, errors, and the
states that enter chunks. Heads that share a key or a query are summed inside one program: no atomics, the same bits
every time.

Source: Gated Delta Networks (Yang et al., 2024); Parallelizing Linear Transformers with the Delta Rule (2024).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import documents
from ops.chunk_table import ChunkTable, chunk_table
from ops.gated_delta_rule import reference
from ops.gated_delta_rule import triton_backward as backward
from ops.gated_delta_rule import triton_forward as forward
from ops.gated_delta_rule import triton_norm as norm
from ops.tuning import tiles

LARGEST_HEAD = 128
STEPS = 8  # documents up to this long, without gradients, go token by token
_PRECISIONS = {
    torch.bfloat16: dict(DOT=tl.bfloat16, PRECISION="ieee"),
    torch.float16: dict(DOT=tl.float16, PRECISION="ieee"),
    torch.float32: dict(DOT=tl.float32, PRECISION="tf32x3"),
}
_NORM_ROWS = 32


class Implementation:
    """ops.gated_delta_rule with the tiles of a backend: PART value columns of a program, or of a step where a program
    takes all, and KEYS key columns likewise, where a program need not have all."""

    def __init__(self, backend: str):
        self.backend = backend

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.gated_delta_rule

    def accepts(self, name, q, k, v, *rest, **options) -> str | None:
        """Why a call cannot run here, from its tensors' dtypes and shapes; None when it can."""
        if q.dtype not in _PRECISIONS:
            return "takes bf16, fp16 and fp32"
        if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
            return f"takes heads of up to {LARGEST_HEAD} numbers"
        return None

    def gated_delta_rule(
        self, q, k, v, log_decay, beta, *, scale=None, initial_state=None, cu_seqlens=None, output_final_state=False,
        qk_l2norm=False,
    ):  # fmt: skip
        """See ops.gated_delta_rule."""
        if v.numel() == 0:
            how = dict(initial_state=initial_state, output_final_state=output_final_state, qk_l2norm=qk_l2norm)
            return reference.gated_delta_rule(q, k, v, log_decay, beta, scale=scale, cu_seqlens=cu_seqlens, **how)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if qk_l2norm:
            q, k = _Unit.apply(q), _Unit.apply(k)
        q, k, v = (x.to(q.dtype).contiguous() for x in (q, k, v))
        log_decay, beta = log_decay.contiguous(), beta.contiguous()
        entries = tiles("gated_delta_rule", self.backend)
        launch = _Launch(q, k, v, chunk_table(k, cu_seqlens, entries["chunks"]["C"]), scale, entries)
        keep = _differentiable(q, k, v, log_decay, beta, initial_state)
        if _few_tokens(q, cu_seqlens) and not keep:
            o, final = launch.steps(q, k, v, log_decay, beta, initial_state)
        else:
            o, final = _GatedDeltaRule.apply(q, k, v, log_decay, beta, initial_state, launch, keep)
        return o, final if output_final_state else None


def _few_tokens(q: Tensor, cu_seqlens: Tensor | None) -> bool:
    longest = q.shape[1] if cu_seqlens is None else max(documents.lengths(cu_seqlens))
    return longest <= STEPS


def _differentiable(*tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class _GatedDeltaRule(torch.autograd.Function):
    """(o, final states [N, HV, K, V]) of contiguous inputs."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, initial_state, launch, keep):
        ctx.set_materialize_grads(False)
        sums, weights, inverses, known, errors = launch.writes(k, v, log_decay, beta, keep)
        states, final = launch.states(k, sums, weights, known, errors, initial_state)
        del known
        o = launch.outputs(q, k, sums, weights, errors, states)
        if keep:
            ctx.save_for_backward(q, k, sums, weights, inverses, errors, states)
            ctx.launch, ctx.dtypes = launch, (log_decay.dtype, beta.dtype)
            ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, sums, weights, inverses, errors, states = ctx.saved_tensors
        launch = ctx.launch
        do = launch.no_output_gradient(q) if do is None else do.contiguous()
        carried, dv = launch.reads(q, k, sums, weights, inverses, do)
        grads, dinitial = launch.state_gradients(q, k, sums, do, carried, dv, dfinal)
        del carried
        dq, dk, *parts = launch.gradients(q, k, sums, weights, do, errors, dv, states, grads)
        dlog_decay, dbeta = launch.decay_gradients(*parts, dv.shape[:3], *ctx.dtypes)
        dinitial = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
        return dq, dk, dv, dlog_decay, dbeta, dinitial, None, None


class _Launch:
    """The kernels on one set of shapes and chunks."""

    def __init__(self, q, k, v, chunks: ChunkTable, scale: float, entries: Mapping[str, Mapping]):
        self.chunks, self.scale, self.entries, self.dtype = chunks, scale, entries, q.dtype
        self.num_tokens = k.shape[0] * k.shape[1]
        self.key_size, self.value_size = k.shape[3], v.shape[3]
        self.heads = dict(HQ=q.shape[2], HK=k.shape[2], HV=v.shape[2])
        self.num_heads = max(q.shape[2], v.shape[2])
        self.whole = [max(16, triton.next_power_of_2(n)) for n in (self.key_size, self.value_size)]
        self.length = length = entries["chunks"]["C"]
        self.sizes = dict(self.heads, H=self.num_heads, K=self.key_size, V=self.value_size, C=length)
        self.sizes |= _PRECISIONS[q.dtype]
        self.sizes |= dict(SOLVE=tl.float32 if q.dtype == torch.float32 else tl.float16, LEVELS=length.bit_length() - 1)

    def _run(self, kernel, count: int, *tensors, shared_out: bool, staged: bool = True, **sizes) -> None:
        """Launch `count` programs, or with shared_out count times the number of parts of the value columns. staged:
        whether shared memory holds the tile's number of stages."""
        tile = self._tile(kernel)
        blocks = dict(BK=min(self.whole[0], tile.get("KEYS", LARGEST_HEAD)), BV=min(self.whole[1], tile["PART"]))
        if shared_out:
            count *= triton.cdiv(self.value_size, blocks["BV"])
        sizes |= {name: size for name, size in {**self.sizes, **blocks}.items() if name in kernel.arg_names}
        if count:
            options = {key: value for key, value in tile.items() if not key.isupper()}
            kernel[(count,)](*tensors, **sizes, **options if staged else {**options, "num_stages": 1})

    def _tile(self, kernel) -> dict:
        """A kernel's entry; fp32 takes twice the shared memory of what entries are made for."""
        entry = self.entries[kernel.__name__]
        if self.dtype != torch.float32:
            return entry
        halves = {key: max(16, value // 2) for key, value in entry.items() if key in ("PART", "KEYS")}
        return {**entry, **halves, "num_stages": 1}

    def _states(self, like: Tensor, num: int, dtype) -> Tensor:
        return like.new_empty(num, self.heads["HV"], self.key_size, self.value_size, dtype=dtype)

    def no_output_gradient(self, q) -> Tensor:
        """Zeros [B, T, H, V], for a loss that reads final states alone."""
        return q.new_zeros(*q.shape[:2], self.num_heads, self.value_size)

    def writes(self, k, v, log_decay, beta, keep: bool) -> tuple[Tensor, ...]:
        """sums, weights [HV, B * T], inverses [B, T, HV, C], known [B, T, HV, K], missing [B, T, HV, V]."""
        sums, weights = (v.new_empty(v.shape[2], self.num_tokens, dtype=torch.float32) for _ in range(2))
        known, missing = k.new_empty(*v.shape[:3], self.key_size), torch.empty_like(v)
        inverses = k.new_empty(*v.shape[:3], self.length) if keep else sums
        count = self.chunks.num_chunks * self.heads["HV"]
        tensors = (k, v, log_decay, beta, self.chunks.table, sums, weights, inverses, known, missing)
        self._run(forward.chunk_writes, count, *tensors, self.num_tokens, shared_out=False, KEEP=keep)
        return sums, weights, inverses, known, missing

    def states(self, k, sums, weights, known, missing, initial_state) -> tuple[Tensor, Tensor]:
        """States that enter chunks [M, HV, K, V], and fp32 final ones [N, HV, K, V]; `missing` becomes errors."""
        states = self._states(k, self.chunks.num_chunks, k.dtype)
        final = self._states(k, self.chunks.num_documents, torch.float32)
        given = initial_state is not None
        initial = initial_state.contiguous() if given else final
        count = self.chunks.num_documents * self.heads["HV"]
        tensors = (k, sums, weights, known, missing, self.chunks.bounds, self.chunks.edges, initial, states, final)
        self._run(forward.pass_states, count, *tensors, self.num_tokens, shared_out=True, GIVEN=given)
        return states, final

    def outputs(self, q, k, sums, weights, errors, states) -> Tensor:
        """o [B, T, H, V]."""
        o = q.new_empty(*q.shape[:2], self.num_heads, self.value_size)
        count = self.chunks.num_chunks * self.num_heads
        tensors = (q, k, sums, weights, errors, states, self.chunks.table, o, self.num_tokens, self.scale)
        self._run(forward.outputs, count, *tensors, shared_out=True)
        return o

    def steps(self, q, k, v, log_decay, beta, initial_state) -> tuple[Tensor, Tensor]:
        """o [B, T, H, V] and final states, token by token."""
        o = q.new_empty(*q.shape[:2], self.num_heads, self.value_size)
        final = self._states(k, self.chunks.num_documents, torch.float32)
        given = initial_state is not None
        initial = initial_state.contiguous() if given else final
        count = self.chunks.num_documents * self.heads["HV"]
        tensors = (q, k, v, log_decay, beta, self.chunks.bounds, initial, o, final, self.scale)
        self._run(forward.steps, count, *tensors, shared_out=True, GIVEN=given)
        return o, final

    def reads(self, q, k, sums, weights, inverses, do) -> tuple[Tensor, Tensor]:
        """carried [B, T, HV, K] and local [B, T, HV, V]: dv = local + carried @ (gradient of the leaving state)."""
        shape = (*k.shape[:2], self.heads["HV"])
        carried, local = k.new_empty(*shape, self.key_size), k.new_empty(*shape, self.value_size)
        count = self.chunks.num_chunks * self.heads["HV"]
        tensors = (q, k, sums, weights, inverses, do, self.chunks.table, carried, local, self.num_tokens, self.scale)
        self._run(backward.chunk_reads, count, *tensors, shared_out=False)
        return carried, local

    def state_gradients(self, q, k, sums, do, carried, local, dfinal) -> tuple[Tensor, Tensor]:
        """Gradients of leaving states [M, HV, K, V] and fp32 of initial ones; `local` becomes dv."""
        grads = self._states(k, self.chunks.num_chunks, k.dtype)
        dinitial = self._states(k, self.chunks.num_documents, torch.float32)
        given = dfinal is not None
        dfinal = dfinal.contiguous() if given else dinitial
        count = self.chunks.num_documents * self.heads["HV"]
        tensors = (q, k, sums, do, carried, local, self.chunks.bounds, self.chunks.edges, dfinal)
        tensors += (grads, dinitial, self.num_tokens, self.scale)
        staged = self.num_heads == self.heads["HV"]  # else each stage holds the queries of a group
        self._run(backward.pass_gradients, count, *tensors, shared_out=True, staged=staged, GIVEN=given)
        return grads, dinitial

    def gradients(self, q, k, sums, weights, do, errors, dv, states, grads) -> tuple[Tensor, ...]:
        """dq, dk, and the parts of the gradients of beta and log_decay: see triton_backward.gradients."""
        parts = self._key_parts()
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        dweights, dsums = (sums.new_empty(parts, len(sums) + self.num_heads, self.num_tokens) for _ in range(2))
        dtotals = sums.new_empty(parts, len(sums), self.chunks.num_chunks)
        tensors = (q, k, sums, weights, do, errors, dv, states, grads, self.chunks.table)
        tensors += (dq, dk, dweights, dsums, dtotals, self.num_tokens, self.scale)
        count = self.chunks.num_chunks * self.heads["HK"] * parts
        self._run(backward.gradients, count, *tensors, shared_out=False)
        return dq, dk, dweights, dsums, dtotals

    def decay_gradients(self, dweights, dsums, dtotals, shape, decay_dtype, beta_dtype) -> tuple[Tensor, Tensor]:
        """dlog_decay, dbeta [B, T, HV]."""
        dlog_decay, dbeta = (dsums.new_empty(shape, dtype=dtype) for dtype in (decay_dtype, beta_dtype))
        tensors = (dweights, dsums, dtotals, self.chunks.table, dbeta, dlog_decay, self.num_tokens)
        count = self.chunks.num_chunks * self.heads["HV"]
        self._run(backward.decay_gradients, count, *tensors, shared_out=False, PARTS=len(dtotals))
        return dlog_decay, dbeta

    def _key_parts(self) -> int:
        return triton.cdiv(self.key_size, min(self.whole[0], self._tile(backward.gradients)["KEYS"]))


class _Unit(torch.autograd.Function):
    """x / sqrt(|x|^2 + 1e-6) over the last dimension."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _Unit._run(norm.unit_rows, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return _Unit._run(norm.unit_row_gradients, x, dy.contiguous())

    @staticmethod
    def _run(kernel, *tensors) -> Tensor:
        result, size = torch.empty_like(tensors[0]), tensors[0].shape[-1]
        num_rows = result.numel() // size
        sizes = dict(K=size, BK=triton.next_power_of_2(size), ROWS=_NORM_ROWS)
        kernel[(triton.cdiv(num_rows, _NORM_ROWS),)](*tensors, result, num_rows, **sizes, num_warps=4)
        return result
