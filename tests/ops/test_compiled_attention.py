"""The attention kernels of the MetaX file compiled without their hardware; a proxy, see test_compiled_kernels."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ops.backends.maca import BACKEND
from test_compiled_kernels import TARGETS

FLOATS = ("q", "k", "v", "sink_k", "sink_v", "o", "do", "dq", "dk", "dv")
KINDS = {
    **dict.fromkeys(FLOATS, "*bf16"),
    **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("first", "last"), "*i32"),
    **dict.fromkeys(("num_rows", "num_tokens", "num_sinks", "stride_q", "stride_k", "stride_v"), "i32"),
    "scale": "fp32",
}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [128, 256])
def test_attention_fits_64_kb_of_shared_memory(target, size):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops.attention import triton_backward, triton_forward
    from ops.attention.maca import TILES

    for name, tile in TILES.items():
        kernel = getattr(triton_forward, name, None) or getattr(triton_backward, name)
        assert tile["num_warps"] <= BACKEND.limits.max_num_warps and tile["num_stages"] == 1
        shrunk = 2 if size > 128 else 1
        sizes = dict(HQ=28, HK=4, K=size, V=size, BK=size, BV=size, TMA=False, PRECISION="tf32", SINKS=True, DLSE=True)
        sizes |= dict(M=tile["queries"] // shrunk, N=tile["keys"] // shrunk, PARTS=1)
        assert min(sizes["M"], sizes["N"]) >= BACKEND.limits.min_dot_size
        sizes = {key: sizes[key] for key in kernel.arg_names if key in sizes}
        signature = {key: "constexpr" if key in sizes else KINDS[key] for key in kernel.arg_names}
        options = dict(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
        source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        assert compiled.metadata.shared <= BACKEND.limits.shared_memory_bytes, name
