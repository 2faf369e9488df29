"""MetaX's tiles of the pointwise ops, the cross-entropy and grouped products compiled for two stand-ins: a proxy."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ops.backends.maca import BACKEND
from test_compiled_kernels import TARGETS

FP32 = ("rstd", "parts", "top", "sums", "picked", "lse", "scale", "inv_freq")
OTHER = {
    **dict.fromkeys(FP32, "*fp32"),
    **dict.fromkeys(("eps", "direction"), "fp32"),
    **dict.fromkeys(("num_rows", "num_tokens", "row_tokens", "num_valid", "num_groups"), "i32"),
    **dict.fromkeys(("stride_row", "stride_token", "stride_head", "stride_group", "stride_out", "stride_in"), "i32"),
    **dict.fromkeys(("positions", "labels"), "*i64"),
    "offsets": "*i32",
}


def kernels(values: str):
    """(kernel, constants, tile) of every kernel at the 7B model's sizes; values: the tensors' type."""
    from ops.grouped_mm import maca as grouped_mm
    from ops.grouped_mm import triton_kernels as products
    from ops.linear_cross_entropy import maca as cross_entropy
    from ops.linear_cross_entropy import triton_kernels as losses
    from ops.rms_norm import launch
    from ops.rms_norm import maca as rms_norm
    from ops.rms_norm import triton_kernels as norms
    from ops.rope import maca as rope
    from ops.rope import triton_kernels as rotary
    from ops.swiglu import maca as swiglu
    from ops.swiglu import triton_kernels as gates

    for name, flag in (("forward", "HAS_RESIDUAL"), ("backward", "HAS_TOTAL")):
        tile = {key: size for key, size in rms_norm.TILES[name].items() if key != "PROGRAMS"}
        shape, options = launch._tile(3584, **tile)
        stages = {"STAGES": options["num_stages"]} if name == "backward" else {}
        yield getattr(norms, name), {"SIZE": 3584, flag: True, **stages, **shape}, options
    yield norms.column_sums, {"SIZE": 3584}, rms_norm.TILES["column_sums"]
    for name, tile in swiglu.TILES.items():
        yield getattr(gates, name), {"SIZE": 18944}, tile
    yield rotary.rotate, {"NUM_HEADS": 28, "HALF": 64, "BLOCK_HALF": 64}, rope.TILES["rotate"]
    for name, tile in cross_entropy.TILES.items():
        yield getattr(losses, name), {"SIZE": 152064}, tile
    for name, tile in grouped_mm.TILES.items():
        groups = {"GROUPS": 16} if name == "rows_product" else {}
        yield getattr(products, name), {"IN": 3584, "OUT": 2560, **groups}, tile


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("values", ["bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_fit_64_kb_of_shared_memory(target, values):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, constants, tile in kernels(values):
        options = {key: tile[key] for key in ("num_warps", "num_stages")}
        assert options["num_warps"] <= BACKEND.limits.max_num_warps
        constants = constants | {key: size for key, size in tile.items() if key not in options}
        kinds = {name: OTHER.get(name, f"*{values}") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        assert compiled.metadata.shared <= BACKEND.limits.shared_memory_bytes, kernel.__name__
