"""Kernels of the MetaX files compiled without their hardware, for two stand-ins: an A100, and an AMD GPU of 64 lanes.

A proxy: it shows that the tiles fit 64 KB of shared memory, not that MetaX's compiler takes them.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ops.backends.maca import BACKEND

POINTERS = {
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), "*bf16"),
    **dict.fromkeys(("log_decay", "dg", "qdq", "states", "grads", "totals", "entering"), "*fp32"),
    **dict.fromkeys(("segments", "edges"), "*i32"),
}
TARGETS = {"A100": ("cuda", 80, 32), "64 lanes": ("hip", "gfx942", 64)}


def gla_kernels():
    """(kernel, its sizes for the 7B model, warps, stages) of every kernel of ops/gla/maca.py."""
    import triton.language as tl

    from ops.gla import triton_backward, triton_forward
    from ops.gla.maca import TILES

    whole = dict(H=4, G=7, P=8, K=128, V=128, BK=128, BV=128, C=TILES.block_tokens, FLOOR=TILES.floor)
    whole |= dict(DOT=tl.bfloat16, PRECISION="tf32")
    for name, tile in TILES.kernels.items():
        kernel = getattr(triton_forward, name, None) or getattr(triton_backward, name)
        split = "BK" if name in ("query_gradients", "key_gradients") else "BV"
        sizes = {**whole, split: tile.part}
        if name == "segment_states":
            sizes["C"] = TILES.state_tokens
        yield kernel, {key: sizes[key] for key in kernel.arg_names if key in sizes}, tile.num_warps, tile.num_stages
    scan = dict(H=4, K=128, V=128, BLOCK=TILES.scan_block, GIVEN=True, REVERSE=True)
    yield triton_forward.scan_states, scan, 4, 1


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_gla_fits_64_kb_of_shared_memory(target):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, sizes, num_warps, num_stages in gla_kernels():
        assert num_warps <= BACKEND.limits.max_num_warps
        kinds = {**POINTERS, "scale": "fp32", **dict.fromkeys(sizes, "constexpr")}
        source = ASTSource(fn=kernel, signature={name: kinds[name] for name in kernel.arg_names}, constexprs=sizes)
        options = dict(num_warps=num_warps, num_stages=num_stages)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        assert compiled.metadata.shared <= BACKEND.limits.shared_memory_bytes, kernel.__name__
