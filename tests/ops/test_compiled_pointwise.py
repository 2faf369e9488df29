"""MetaX's tiles of the pointwise ops, the cross-entropy and grouped products compiled for two stand-ins: a proxy.

A matrix has stride 1 along one dimension, and everything starts at multiples of 16: what takes the most shared memory.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ops import tuning
from ops.backends.maca import BACKEND
from test_compiled_kernels import TARGETS

FP32 = ("rstd", "parts", "top", "sums", "picked", "lse", "scale", "inv_freq")
OTHER = {
    **dict.fromkeys(FP32, "*fp32"),
    **dict.fromkeys(("eps", "direction"), "fp32"),
    **dict.fromkeys(("num_rows", "num_tokens", "row_tokens", "num_valid", "num_groups", "size"), "i32"),
    **dict.fromkeys(("stride_group", "stride_out", "stride_in"), "i32"),
    **{f"{x}_stride_{dimension}": "i32" for x in "qk" for dimension in ("row", "token", "head")},
    **dict.fromkeys(("positions", "labels"), "*i64"),
    "offsets": "*i32",
}


def kernels():
    """(kernel launcher, shared memory that its tune entry allows) of every kernel at the 7B model's sizes."""
    from ops.accumulate.launch import Kernels as Sums
    from ops.grouped_mm.launch import Kernels as Products
    from ops.linear_cross_entropy.launch import Softmax
    from ops.rms_norm.launch import Kernels as Norms
    from ops.rope.launch import Kernels as Rotary
    from ops.swiglu.launch import Kernels as Gates

    makes = [
        ("accumulate", Sums),
        ("rms_norm", Norms, 3584, BACKEND.limits.max_num_warps),
        ("swiglu", Gates, 18944),
        ("rope", Rotary, 28, 4, 128),
        ("rope", Rotary, 7, 0, 128),
        ("linear_cross_entropy", Softmax, 152064),
        ("grouped_mm", Products, 16, 2560, 3584, "ieee"),
    ]
    for op, make, *sizes in makes:
        entries = tuning.read(tuning.tune_file(op, "maca"), BACKEND)[tuning.DEFAULT]
        for launcher in make(*sizes, entries).launchers:
            entry = entries[launcher.kernel.__name__]
            yield launcher, entry.get("shared_bytes", BACKEND.limits.shared_memory_bytes)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("values", ["bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_take_the_shared_memory_that_their_entries_say(target, values):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for launcher, shared_bytes in kernels():
        kernel, options = launcher.kernel, {key: launcher.options[key] for key in ("num_warps", "num_stages")}
        assert options["num_warps"] <= BACKEND.limits.max_num_warps
        for ones in ({"stride_in": 1}, {"stride_out": 1}) if "stride_in" in kernel.arg_names else ({},):
            constants = launcher.constants | ones
            kinds = {name: OTHER.get(name, f"*{values}") for name in kernel.arg_names}
            kinds |= dict.fromkeys(constants, "constexpr")
            aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[0] in "*i"}
            source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
            compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
            assert compiled.metadata.shared <= shared_bytes, kernel.__name__
