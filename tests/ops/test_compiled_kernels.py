"""Kernels of the MetaX files compiled without their hardware, for two stand-ins: an A100, and an AMD GPU of 64 lanes.

A proxy: it shows that the tiles fit 64 KB of shared memory, not that MetaX's compiler takes them.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ops.backends.maca import BACKEND

POINTERS = {
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv", "states", "leaving"), "*bf16"),
    **dict.fromkeys(("log_decay", "dg", "qdq", "sums", "totals", "added", "given", "ends"), "*fp32"),
    **dict.fromkeys(("chunks", "edges"), "*i32"),
}
TARGETS = {"A100": ("cuda", 80, 32), "64 lanes": ("hip", "gfx942", 64)}


def gla_launchers():
    """Every kernel of ops/gla/maca.py with its constants for the 7B model, its warps and stages."""
    import torch

    from ops.gla.chunked import Kernels
    from ops.gla.maca import TILES

    return Kernels(7, 4, 128, 128, torch.bfloat16, TILES).launchers


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_gla_fits_64_kb_of_shared_memory(target):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for launcher in gla_launchers():
        assert launcher.options["num_warps"] <= BACKEND.limits.max_num_warps
        kernel, constants = launcher.kernel, launcher.constants
        kinds = {**POINTERS, "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(fn=kernel, signature={name: kinds[name] for name in kernel.arg_names}, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launcher.options)
        assert compiled.metadata.shared <= BACKEND.limits.shared_memory_bytes, kernel.__name__
