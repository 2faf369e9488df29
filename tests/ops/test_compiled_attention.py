"""The attention kernels of the MetaX file compiled without their hardware; a proxy, see test_compiled_kernels."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ops import tuning
from ops.backends.maca import BACKEND
from test_compiled_kernels import TARGETS

FLOATS = ("q", "k", "v", "sink_k", "sink_v", "o", "do", "dq", "dk", "dv")
KINDS = {
    **dict.fromkeys(FLOATS, "*bf16"),
    **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("first", "last"), "*i32"),
    **dict.fromkeys(("num_rows", "num_queries", "num_tokens", "num_sinks", "stride_q", "stride_k", "stride_v"), "i32"),
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

    entries = tuning.read(tuning.tune_file("attention", "maca"), BACKEND)[tuning.DEFAULT]
    for entry_name, tile in entries.items():
        name, wide = entry_name.removesuffix("_fp32"), entry_name.endswith("_fp32")
        if wide and size > 128:
            continue  # refused
        kernel = getattr(triton_forward, name, None) or getattr(triton_backward, name)
        shrunk = 2 if size > 128 else 1
        sizes = dict(
            HQ=28,
            HK=4,
            K=size,
            V=size,
            BK=size,
            BV=size,
            TMA=False,
            PRECISION="ieee" if wide else "tf32",
            SINKS=True,
            DLSE=True,
        )
        sizes |= dict(M=max(16, tile["M"] // shrunk), N=max(16, tile["N"] // shrunk), PARTS=1)
        sizes = {key: sizes[key] for key in kernel.arg_names if key in sizes}
        kinds = {**KINDS, **dict.fromkeys(FLOATS, "*fp32")} if wide else KINDS
        signature = {key: "constexpr" if key in sizes else kinds[key] for key in kernel.arg_names}
        options = dict(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
        source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        assert compiled.metadata.shared <= tile["shared_bytes"], entry_name
