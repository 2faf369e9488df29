"""ops.gla_carry's kernels compiled without their hardware: NVIDIA's tiles for an H100, MetaX's for two stand-ins."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from ops import tuning
from ops.backends import cuda, maca
from test_compiled_kernels import TARGETS

FP32 = ("log_decay", "dg", "before", "inside", "after", "sums", "others", "shares", "state")
CASES = [("cuda", ("cuda", 90, 32), torch.float32, 128), ("cuda", ("cuda", 90, 32), torch.bfloat16, 256)]
CASES += [("cuda", ("cuda", 90, 32), torch.bfloat16, 128)]
CASES += [("maca", target, dtype, 128) for target in TARGETS.values() for dtype in (torch.bfloat16, torch.float16)]
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("backend, target, dtype, size", CASES, ids=str)
def test_tiles_take_the_shared_memory_that_their_entries_say(backend, target, dtype, size):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops.gla_carry.launch import SHARED_OUT, Kernels

    descriptor = {"cuda": cuda, "maca": maca}[backend].BACKEND
    entries = tuning.read(tuning.tune_file("gla_carry", backend), descriptor)[tuning.DEFAULT]
    every = None if dtype == torch.bfloat16 and size == 128 else "large" if dtype == torch.bfloat16 else "wide"
    for launcher in Kernels(7, 4, size, size, dtype, entries).launchers.values():
        kernel, constants = launcher.kernel, launcher.constants
        kinds = dict.fromkeys(kernel.arg_names, NAMES[dtype]) | dict.fromkeys(FP32, "*fp32")
        kinds |= {"scale": "fp32", "length": "i32", "num_chunks": "i32", **dict.fromkeys(constants, "constexpr")}
        signature = {name: kinds[name] for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        options = {name: launcher.options[name] for name in ("num_warps", "num_stages")}
        compiled = triton.compile(source, target=GPUTarget(*target), options=options)
        entry = entries[every if every and kernel.__name__ in SHARED_OUT else kernel.__name__]
        limit = entry.get("shared_bytes", descriptor.limits.shared_memory_bytes)
        assert compiled.metadata.shared <= limit, kernel.__name__
