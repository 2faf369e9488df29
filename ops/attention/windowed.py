"""Attention on our Triton kernels: host side, shared by the backends' files. Windows, documents, sinks, log-sum-exps.

Forward: one kernel. Backward: dq with delta = rowsum(do * o) - dlse, then dk and dv, then the sinks' gradients as
partial sums that one more sum finishes. No atomics: the same bits every time.

tiles maps each kernel's name (with _fp32 for that dtype) to M queries and N keys a tile, num_warps and num_stages.
Besides, key_gradients has PROGRAMS, below which a key head's query heads are shared out to several programs (fp32
partial sums), and sink_gradients has SUMS, the partial sums of each sink key.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.attention import triton_backward as backward
from ops.attention import triton_forward as forward
from ops.attention.visible import visible

LN2 = 0.6931471805599453
LARGEST_HEAD = 256
LARGEST_WHOLE_SIZE = 128  # larger heads get half the queries and keys a tile


def refusal(q: Tensor, v: Tensor, *, largest_fp32: int = LARGEST_HEAD) -> str | None:
    """Why the kernels cannot take these dtypes and sizes; None when they can."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "takes bf16, fp16 and fp32"
    largest = largest_fp32 if q.dtype == torch.float32 else LARGEST_HEAD
    if max(q.shape[3], v.shape[3]) > largest:
        return f"takes heads of up to {largest} numbers in {q.dtype}"
    return None


def attention(
    q, k, v, *, window, cu_seqlens, sink_k, sink_v, scale, return_lse, tiles: Mapping[str, Mapping], launch=None,
    tma: bool = False,
):  # fmt: skip
    """See ops.attention. q must have a query. launch: a kind of Launch, for devices with kernels of their own. tma:
    whether the device copies tiles by tensor descriptors."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:  # the running maximum is taken before scaling
        q, scale = q * scale, 1.0
    if sink_k is not None:
        sink_k, sink_v = (x.to(k.dtype).contiguous() for x in (sink_k, sink_v))
    seen = visible(cu_seqlens, window, num_queries=q.shape[1], num_tokens=k.shape[1], device=q.device)
    o, lse = _Attention.apply(q, k, v, sink_k, sink_v, *seen, scale, return_lse, tiles, launch or Launch, tma)
    return (o, lse) if return_lse else o


class _Attention(torch.autograd.Function):
    """(o [B, Q, Hq, V], lse [B, Q, Hq] or None) of Q queries."""

    @staticmethod
    def forward(ctx, q, k, v, sink_k, sink_v, first, last, scale, return_lse, tiles, kind, tma):
        q, k, v = (_by_token(x) for x in (q, k, v))
        launch = kind(q, k, v, sink_k, scale, tiles, tma)
        o, lse = launch.outputs(q, k, v, sink_k, sink_v, first)
        ctx.save_for_backward(q, k, v, sink_k, sink_v, first, last, o, lse)
        ctx.launch = launch
        ctx.set_materialize_grads(False)
        return o, (lse * LN2).transpose(1, 2) if return_lse else None

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, sink_k, sink_v, first, last, o, lse = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else _by_token(do.contiguous())
        dlse = None if dlse is None else dlse.contiguous()
        dq, delta = ctx.launch.query_gradients(q, k, v, sink_k, sink_v, o, do, first, lse, dlse)
        dk, dv = ctx.launch.key_gradients(q, k, v, do, last, lse, delta)
        sinks = (None, None)
        if sink_k is not None:
            sinks = ctx.launch.sink_gradients(q, sink_k, sink_v, do, lse, delta)
        return dq, dk, dv, *sinks, *[None] * 7


def _by_token(x: Tensor) -> Tensor:
    """x [B, T, H, D] as the kernels read it: heads dense in a token, rows one behind the other, addresses for TMA."""
    dense = x.stride(3) == 1 and x.stride(2) == x.shape[3]
    follows = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    return x if dense and follows and aligned else x.clone(memory_format=torch.contiguous_format)


def added(parts: Tensor, dtype) -> Tensor:
    """Sum of the parts [P, ...]."""
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(dtype)


class Launch:
    """The kernels on one set of shapes."""

    def __init__(self, q, k, v, sink_k, scale: float, tiles: Mapping[str, Mapping], tma: bool):
        self.num_rows, self.num_queries, self.num_heads, self.key_size = q.shape
        self.num_tokens, self.num_key_heads, self.value_size = v.shape[1:]
        self.scale, self.tiles, self.suffix = scale, tiles, "_fp32" if q.dtype == torch.float32 else ""
        self.num_sinks = 0 if sink_k is None else len(sink_k)
        padded = [max(16, triton.next_power_of_2(size)) for size in (self.key_size, self.value_size)]
        self.halve = max(padded) > LARGEST_WHOLE_SIZE
        self.sizes = dict(HQ=self.num_heads, HK=self.num_key_heads, K=self.key_size, V=self.value_size)
        self.sizes |= dict(BK=padded[0], BV=padded[1], PRECISION="ieee" if q.dtype == torch.float32 else "tf32")
        whole = padded == [self.key_size, self.value_size]
        self.tma = tma and whole and q.dtype != torch.float32

    def entry(self, name: str) -> Mapping:
        """What tiles says about a kernel for this dtype."""
        return self.tiles[name + self.suffix]

    def _tile(self, kernel) -> tuple[dict, dict]:
        """(tile sizes, launch options) of a kernel."""
        entry = self.entry(kernel.__name__)
        sizes = {key: max(16, entry[key] // 2) if self.halve else entry[key] for key in "MN"}
        return sizes, {key: value for key, value in entry.items() if not key.isupper()}

    def _described(self, num_block_tokens: int, *tensors: Tensor) -> list:
        """Tensors [B, T, H, size] as descriptors of blocks of tokens of one head, where these are used."""
        if not self.tma:
            return list(tensors)
        from triton.tools.tensor_descriptor import TensorDescriptor

        return [
            TensorDescriptor(
                x,
                [x.shape[0], x.shape[1], x.shape[2] * x.shape[3]],
                [x.shape[1] * x.stride(1), x.stride(1), 1],
                [1, num_block_tokens, x.shape[3]],
            )
            for x in tensors
        ]

    def outputs(self, q, k, v, sink_k, sink_v, first) -> tuple[Tensor, Tensor]:
        """o in q's dtype and the base-2 log-sum-exp fp32 [B, Hq, Q]."""
        o = q.new_empty(*q.shape[:3], self.value_size)
        lse = q.new_empty(self.num_rows, self.num_heads, self.num_queries, dtype=torch.float32)
        tile, options = self._tile(forward.outputs)
        queries, keys = self._described(tile["M"], q), self._described(tile["N"], k, v)
        grid = (self.num_rows * self.num_heads * triton.cdiv(self.num_queries, tile["M"]),)
        forward.outputs[grid](
            *queries, *keys, *self._sinks(sink_k, sink_v, q), first, o, lse, self.scale, self.num_queries,
            self.num_tokens, self.num_sinks, q.stride(1), k.stride(1), v.stride(1),
            **self.sizes, **tile, SINKS=sink_k is not None, TMA=self.tma, **options,
        )  # fmt: skip
        return o, lse

    def query_gradients(self, q, k, v, sink_k, sink_v, o, do, first, lse, dlse) -> tuple[Tensor, Tensor]:
        """dq, and delta fp32 [B, Hq, Q]."""
        dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
        tile, options = self._tile(backward.query_gradients)
        queries, keys = self._described(tile["M"], q, do), self._described(tile["N"], k, v)
        grid = (self.num_rows * self.num_heads * triton.cdiv(self.num_queries, tile["M"]),)
        backward.query_gradients[grid](
            queries[0], *keys, *self._sinks(sink_k, sink_v, q), o, queries[1], first, lse,
            delta if dlse is None else dlse, delta, dq, self.scale, self.num_queries, self.num_tokens,
            self.num_sinks, q.stride(1), k.stride(1), v.stride(1),
            **self.sizes, **tile, SINKS=sink_k is not None, DLSE=dlse is not None, TMA=self.tma, **options,
        )  # fmt: skip
        return dq, delta

    def key_gradients(self, q, k, v, do, last, lse, delta) -> tuple[Tensor, Tensor]:
        """dk and dv."""
        tile, options = self._tile(backward.key_gradients)
        num_programs, parts, (dk, dv) = self._key_parts(k, v, tile["N"])
        queries, keys = self._described(tile["M"], q, do), self._described(tile["N"], k, v)
        backward.key_gradients[(num_programs * parts,)](
            queries[0], *keys, queries[1], last, lse, delta, dk, dv, self.scale, self.num_queries,
            self.num_tokens, q.stride(1), k.stride(1), v.stride(1), **self.sizes, **tile, PARTS=parts, TMA=self.tma,
            **options,
        )  # fmt: skip
        return added(dk, k.dtype), added(dv, v.dtype)

    def _key_parts(self, k, v, num_block_tokens: int) -> tuple[int, int, tuple[Tensor, Tensor]]:
        """(programs of one part, parts, dk and dv with the parts first): too few programs share out query heads."""
        num_programs = self.num_rows * self.num_key_heads * triton.cdiv(self.num_tokens, num_block_tokens)
        wanted = self.entry("key_gradients")["PROGRAMS"]
        parts = min(self.num_heads // self.num_key_heads, triton.cdiv(wanted, num_programs))
        dtype = k.dtype if parts == 1 else torch.float32
        return num_programs, parts, tuple(torch.empty(parts, *x.shape, dtype=dtype, device=x.device) for x in (k, v))

    def sink_gradients(self, q, sink_k, sink_v, do, lse, delta) -> tuple[Tensor, Tensor]:
        """Gradients of the sinks, summed over all queries."""
        tile, options = self._tile(backward.sink_gradients)
        num_parts = self.entry("sink_gradients")["SUMS"]
        dk, dv = (q.new_empty(num_parts, *x.shape, dtype=torch.float32) for x in (sink_k, sink_v))
        queries = self._described(tile["M"], q, do)
        backward.sink_gradients[(num_parts, self.num_key_heads, triton.cdiv(self.num_sinks, tile["N"]))](
            queries[0], sink_k, sink_v, queries[1], lse, delta, dk, dv, self.scale, self.num_rows, self.num_queries,
            self.num_sinks, q.stride(1), **self.sizes, **tile, TMA=self.tma, **options,
        )  # fmt: skip
        return added(dk, sink_k.dtype), added(dv, sink_v.dtype)

    def _sinks(self, sink_k, sink_v, unused: Tensor) -> tuple[Tensor, Tensor]:
        return (unused, unused) if sink_k is None else (sink_k, sink_v)
