"""Launches of the Hopper kernels (gluon_hopper.py), with the interface of windowed.Launch, which takes the rest.

They take one row (B = 1) in bf16 or fp16 with heads of 64 or 128, and no sinks except in key_gradients, where sinks
make no difference. Gluon's interface moves between Triton's releases, so they run with the one they were written for.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from ops.attention import windowed

TRITON = "3.6."
SIZES = (64, 128)


class Launch(windowed.Launch):
    """The Hopper kernels of the backward pass where the inputs allow it, else the plain ones.

    There is none of `outputs`: the plain kernel with tensor descriptors was as fast.
    """

    def __init__(self, q, k, v, sink_k, scale, tiles, tma):
        super().__init__(q, k, v, sink_k, scale, tiles, tma)
        known = triton.__version__.startswith(TRITON) and torch.cuda.get_device_capability(q.device)[0] == 9
        sizes = self.key_size in SIZES and self.value_size in SIZES
        self.takes = known and sizes and self.num_rows == 1 and q.dtype in (torch.bfloat16, torch.float16)

    def _sizes(self, name: str) -> dict:
        """The constants of a kernel."""
        tile = self.tiles[f"gluon_{name}"]
        sizes = dict(HQ=self.num_heads, HK=self.num_key_heads, K=self.key_size, V=self.value_size)
        return sizes | dict(M=tile["M"], N=tile["N"], STAGES=tile["num_stages"], num_warps=tile["num_warps"])

    def query_gradients(self, q, k, v, sink_k, sink_v, o, do, first, lse, dlse) -> tuple[Tensor, Tensor]:
        """See windowed.Launch."""
        if not self.takes or sink_k is not None:
            return super().query_gradients(q, k, v, sink_k, sink_v, o, do, first, lse, dlse)
        from ops.attention import gluon_hopper

        sizes = self._sizes("query_gradients")
        queries, keys = sizes["M"], sizes["N"]
        dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
        gluon_hopper.query_gradients[(self.num_heads * triton.cdiv(self.num_queries, queries),)](
            _tiles_of(q, queries), _tiles_of(k, keys), _tiles_of(v, keys), o, do,
            _tiles_of(do, queries), first, lse, delta if dlse is None else dlse, delta, dq, self.scale,
            self.num_queries, self.num_tokens, DLSE=dlse is not None, **sizes,
        )  # fmt: skip
        return dq, delta

    def key_gradients(self, q, k, v, do, last, lse, delta) -> tuple[Tensor, Tensor]:
        """See windowed.Launch."""
        if not self.takes:
            return super().key_gradients(q, k, v, do, last, lse, delta)
        from ops.attention import gluon_hopper

        sizes = self._sizes("key_gradients")
        queries, keys = sizes["M"], sizes["N"]
        num_programs, parts, (dk, dv) = self._key_parts(k, v, keys)
        aligned = keys % queries == 0 == (self.num_tokens - self.num_queries) % queries  # else a tile starts anywhere
        rest = -self.num_queries % queries + (0 if aligned else queries)
        lse, delta = (pad(x, (0, rest)) for x in (lse, delta))
        gluon_hopper.key_gradients[(num_programs * parts,)](
            _tiles_of(q, queries), _tiles_of(k, keys), _tiles_of(v, keys),
            _tiles_of(do, queries), last, lse, delta, dk, dv, self.scale,
            self.num_queries, self.num_tokens, lse.shape[2], PARTS=parts, **sizes,
        )  # fmt: skip
        return windowed.added(dk, k.dtype), windowed.added(dv, v.dtype)


def _tiles_of(x: Tensor, num_block_tokens: int):
    """x [1, T, H, size] as a descriptor of blocks of tokens of one head."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [num_block_tokens, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # any 16-bit type
    return TensorDescriptor(x, [x.shape[1], x.shape[2] * x.shape[3]], [x.stride(1), 1], block, layout)
