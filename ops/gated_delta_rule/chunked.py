"""Gated delta rule on Triton kernels, chunk by chunk: host side, shared by the backends' files.

Documents are cut into chunks that never cross their boundaries. Forward: (1) each chunk's errors, as a linear function
of the state that enters it (the WY representation, with one inverse of a triangular matrix); (2) the state from chunk
to chunk through each document; (3) outputs. Backward: (1) each chunk's part of the gradient of its errors; (2) the
gradient of the state from chunk to chunk, from the end; (3) gradients of all inputs. The serial kernels share out value
heads and value columns, the others chunks and heads. The serial ones hold states transposed, so that on Hopper each
product takes one operand from registers and the other from shared memory, filled ahead by copies through descriptors.
Kept for backward, in the inputs' dtype: inverses, errors, and the states that enter chunks. Heads that share a key or a
query are summed inside one program: no atomics, the same bits every time.

Source: Gated Delta Networks (Yang et al., 2024); Parallelizing Linear Transformers with the Delta Rule (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

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
_BOXES = {
    "carried": (1, "C", "BK"),
    "local": (1, "BV", "C"),
    "grads": (1, "BV", "BK"),
    **dict.fromkeys(("q", "k"), ("C", 1, "BK")),
    "do": ("C", 1, "BV"),
}
"""Blocks of descriptors, in three dimensions: by chunk and head, or tokens by head. In the backward pass they took
three quarters of the time of pointers on an H200; in the forward one, pointers were faster."""


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
        launch = _Launch(self.backend, q, k, v, chunk_table(k, cu_seqlens, entries["chunks"]["C"]), scale, entries)
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


class _Numbers(NamedTuple):
    """A number of each token, fp32, and of each chunk: see triton_forward."""

    sums: Tensor
    weights: Tensor
    leaves: Tensor
    totals: Tensor


class _GatedDeltaRule(torch.autograd.Function):
    """(o, final states [N, HV, K, V]) of contiguous inputs."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, initial_state, launch, keep):
        ctx.set_materialize_grads(False)
        numbers, inverses, known, errors = launch.writes(k, v, log_decay, beta, keep)
        states, final = launch.states(k, numbers, known, errors, initial_state)
        del known
        o = launch.outputs(q, k, numbers, errors, states)
        if keep:
            ctx.save_for_backward(q, k, *numbers, inverses, errors, states)
            ctx.launch, ctx.dtypes = launch, (log_decay.dtype, beta.dtype)
            ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, *numbers, inverses, errors, states = ctx.saved_tensors
        launch, numbers = ctx.launch, _Numbers(*numbers)
        do = launch.no_output_gradient(q) if do is None else do.contiguous()
        enters, carried, local = launch.reads(q, k, numbers, inverses, do)
        grads, dv, dinitial = launch.state_gradients(q, k, numbers.totals, enters, do, carried, local, dfinal)
        del carried, local
        dq, dk, *parts = launch.gradients(q, k, numbers, do, errors, dv, states, grads)
        dlog_decay, dbeta = launch.decay_gradients(*parts, dv.shape[:3], *ctx.dtypes)
        dinitial = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
        return dq, dk, dv, dlog_decay, dbeta, dinitial, None, None


def _boxable(q: Tensor, *sizes: int) -> bool:
    """Whether kernels can have blocks copied by Hopper's unit for that, through descriptors."""
    copies = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 9
    return copies and q.dtype.itemsize == 2 and all(size % 8 == 0 for size in sizes)


def _box(name: str, x: Tensor, sizes: Mapping[str, int]):
    """The descriptor of a kernel's argument."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape = [sizes.get(size, size) for size in _BOXES[name]]
    return TensorDescriptor.from_tensor(x.view(-1, *x.shape[-2:]), shape)


class _Launch:
    """The kernels on one set of shapes and chunks."""

    def __init__(self, backend: str, q, k, v, chunks: ChunkTable, scale: float, entries: Mapping[str, Mapping]):
        self.chunks, self.scale, self.entries, self.dtype = chunks, scale, entries, q.dtype
        self.num_tokens = k.shape[0] * k.shape[1]
        self.key_size, self.value_size = k.shape[3], v.shape[3]
        self.heads = dict(HQ=q.shape[2], HK=k.shape[2], HV=v.shape[2])
        self.num_heads = max(q.shape[2], v.shape[2])
        self.whole = [max(16, triton.next_power_of_2(n)) for n in (self.key_size, self.value_size)]
        self.length = length = entries["chunks"]["C"]
        self.sizes = dict(self.heads, H=self.num_heads, K=self.key_size, V=self.value_size, C=length)
        self.sizes |= _PRECISIONS[q.dtype]
        self.boxable = backend == "cuda" and _boxable(q, self.key_size, self.value_size)
        self.sizes |= dict(SOLVE=tl.float32 if q.dtype == torch.float32 else tl.float16, LEVELS=length.bit_length() - 1)

    def _run(self, kernel, count: int, *, shared_out: bool, **tensors) -> None:
        """Launch `count` programs, or with shared_out count times the number of parts of the value columns. tensors:
        the kernel's other arguments."""
        tile = self._tile(kernel)
        blocks = {"BK": min(self.whole[0], tile.get("KEYS", LARGEST_HEAD))}
        blocks["BV"] = min(self.whole[1], tile.get("PART", LARGEST_HEAD))
        if shared_out:
            count *= triton.cdiv(self.value_size, blocks["BV"])
        sizes = {name: size for name, size in {**self.sizes, **blocks}.items() if name in kernel.arg_names}
        if "BOXED" in kernel.arg_names:
            boxed = {name: x for name, x in tensors.items() if name in _BOXES}
            sizes["BOXED"] = (
                tile["num_stages"] > 1 and self.boxable and all(x.data_ptr() % 16 == 0 for x in boxed.values())
            )
            if sizes["BOXED"]:
                tensors |= {name: _box(name, x, {**self.sizes, **blocks}) for name, x in boxed.items()}
        if count:
            options = {key: value for key, value in tile.items() if not key.isupper()}
            kernel[(count,)](**tensors, **sizes, **options)

    def _tile(self, kernel) -> dict:
        """A kernel's entry; fp32 takes twice the shared memory of what entries are made for."""
        name = kernel.__name__
        if kernel is backward.pass_gradients and self.num_heads > self.heads["HV"]:
            name = "pass_gradients_grouped"  # each step, and each stage, holds the queries of a group
        entry = self.entries[name]
        if self.dtype != torch.float32:
            return entry
        halves = {key: max(16, value // 2) for key, value in entry.items() if key in ("PART", "KEYS")}
        return {**entry, **halves, "num_stages": 1}

    def _blocks(self, like: Tensor, *shape: int, dtype=None) -> Tensor:
        """Memory for what kernels keep by chunk and value head, [M * HV, *shape]."""
        return like.new_empty(self.chunks.num_chunks * self.heads["HV"], *shape, dtype=dtype)

    def _states(self, like: Tensor) -> Tensor:
        """fp32 states [N, HV, K, V], a document's each."""
        shape = (self.chunks.num_documents, self.heads["HV"], self.key_size, self.value_size)
        return like.new_empty(shape, dtype=torch.float32)

    def no_output_gradient(self, q) -> Tensor:
        """Zeros [B, T, H, V], for a loss that reads final states alone."""
        return q.new_zeros(*q.shape[:2], self.num_heads, self.value_size)

    def writes(self, k, v, log_decay, beta, keep: bool) -> tuple[_Numbers, Tensor, Tensor, Tensor]:
        """numbers, inverses [M * HV, C, C], known [M * HV, C, K], missing [M * HV, V, C]."""
        sums, weights = (v.new_empty(v.shape[2], self.num_tokens, dtype=torch.float32) for _ in range(2))
        leaves, totals = (self._blocks(k, *shape, dtype=torch.float32) for shape in ((self.length,), ()))
        known, missing = self._blocks(k, self.length, self.key_size), self._blocks(k, self.value_size, self.length)
        inverses = self._blocks(k, self.length, self.length) if keep else sums
        self._run(
            forward.chunk_writes, self.chunks.num_chunks * self.heads["HV"], shared_out=False, KEEP=keep,
            k=k, v=v, log_decay=log_decay, beta=beta, chunks=self.chunks.table, sums=sums, weights=weights,
            leaves=leaves, totals=totals, inverses=inverses, known=known, missing=missing, num_tokens=self.num_tokens,
        )  # fmt: skip
        return _Numbers(sums, weights, leaves, totals), inverses, known, missing

    def states(self, k, numbers: _Numbers, known, missing, initial_state) -> tuple[Tensor, Tensor]:
        """States that enter chunks [M * HV, V, K], and fp32 final ones [N, HV, K, V]; `missing` becomes errors."""
        states, final = self._blocks(k, self.value_size, self.key_size), self._states(k)
        given = initial_state is not None
        self._run(
            forward.pass_states, self.chunks.num_documents * self.heads["HV"], shared_out=True, GIVEN=given,
            k=k, leaves=numbers.leaves, totals=numbers.totals, known=known, missing=missing, errors=missing,
            bounds=self.chunks.bounds, edges=self.chunks.edges,
            initial=initial_state.contiguous() if given else final, states=states, final=final,
        )  # fmt: skip
        return states, final

    def outputs(self, q, k, numbers: _Numbers, errors, states) -> Tensor:
        """o [B, T, H, V]."""
        o = q.new_empty(*q.shape[:2], self.num_heads, self.value_size)
        self._run(
            forward.outputs, self.chunks.num_chunks * self.num_heads, shared_out=True, q=q, k=k, sums=numbers.sums,
            weights=numbers.weights, errors=errors, states=states, chunks=self.chunks.table, o=o,
            num_tokens=self.num_tokens, scale=self.scale,
        )  # fmt: skip
        return o

    def steps(self, q, k, v, log_decay, beta, initial_state) -> tuple[Tensor, Tensor]:
        """o [B, T, H, V] and final states, token by token."""
        o, final = q.new_empty(*q.shape[:2], self.num_heads, self.value_size), self._states(k)
        given = initial_state is not None
        self._run(
            forward.steps, self.chunks.num_documents * self.heads["HV"], shared_out=True, GIVEN=given, q=q, k=k, v=v,
            log_decay=log_decay, beta=beta, bounds=self.chunks.bounds,
            initial=initial_state.contiguous() if given else final, o=o, final=final, scale=self.scale,
        )  # fmt: skip
        return o, final

    def reads(self, q, k, numbers: _Numbers, inverses, do) -> tuple[Tensor, Tensor, Tensor]:
        """enters [M * HV, C], carried [M * HV, C, K] and local [M * HV, V, C]: see triton_backward.chunk_reads."""
        enters = torch.empty_like(numbers.leaves)
        carried, local = self._blocks(k, self.length, self.key_size), self._blocks(k, self.value_size, self.length)
        self._run(
            backward.chunk_reads, self.chunks.num_chunks * self.heads["HV"], shared_out=False, q=q, k=k,
            sums=numbers.sums, weights=numbers.weights, leaves=numbers.leaves, inverses=inverses, do=do,
            chunks=self.chunks.table, enters=enters, carried=carried, local=local, num_tokens=self.num_tokens,
            scale=self.scale,
        )  # fmt: skip
        return enters, carried, local

    def state_gradients(self, q, k, totals, enters, do, carried, local, dfinal) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of leaving states [M * HV, V, K], dv [B, T, HV, V], and fp32 gradients of initial states."""
        grads, dinitial = self._blocks(k, self.value_size, self.key_size), self._states(k)
        dv = k.new_empty(*k.shape[:2], self.heads["HV"], self.value_size)
        given = dfinal is not None
        self._run(
            backward.pass_gradients, self.chunks.num_documents * self.heads["HV"], shared_out=True, GIVEN=given,
            q=q, k=k, totals=totals, enters=enters, do=do, carried=carried, local=local, bounds=self.chunks.bounds,
            edges=self.chunks.edges, dfinal=dfinal.contiguous() if given else dinitial, grads=grads, dv=dv,
            dinitial=dinitial, scale=self.scale,
        )  # fmt: skip
        return grads, dv, dinitial

    def gradients(self, q, k, numbers: _Numbers, do, errors, dv, states, grads) -> tuple[Tensor, ...]:
        """dq, dk, and the parts of the gradients of beta and log_decay: see triton_backward.gradients."""
        parts, num_heads = self._key_parts(), self.heads["HV"]
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        dweights, dsums = (
            dv.new_empty(parts, num_heads + self.num_heads, self.num_tokens, dtype=torch.float32) for _ in range(2)
        )
        dtotals = dweights.new_empty(parts, num_heads, self.chunks.num_chunks)
        self._run(
            backward.gradients, self.chunks.num_chunks * self.heads["HK"] * parts, shared_out=False, q=q, k=k,
            sums=numbers.sums, weights=numbers.weights, do=do, errors=errors, derrors=dv, states=states, grads=grads,
            chunks=self.chunks.table, dq=dq, dk=dk, dweights=dweights, dsums=dsums, dtotals=dtotals,
            num_tokens=self.num_tokens, scale=self.scale,
        )  # fmt: skip
        return dq, dk, dweights, dsums, dtotals

    def decay_gradients(self, dweights, dsums, dtotals, shape, decay_dtype, beta_dtype) -> tuple[Tensor, Tensor]:
        """dlog_decay, dbeta [B, T, HV]."""
        dlog_decay, dbeta = (dsums.new_empty(shape, dtype=dtype) for dtype in (decay_dtype, beta_dtype))
        self._run(
            backward.decay_gradients, self.chunks.num_chunks * self.heads["HV"], shared_out=False, PARTS=len(dtotals),
            dweights=dweights, dsums=dsums, dtotals=dtotals, chunks=self.chunks.table, dbeta=dbeta, dlog=dlog_decay,
            num_tokens=self.num_tokens,
        )  # fmt: skip
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
