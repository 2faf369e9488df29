"""The spiking linear layer's kernels compiled without their hardware: MetaX's tiles in 64 KB (a proxy, see
test_compiled_kernels) and, with the Triton that they were written for, the Hopper kernels in 227 KB."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from ops import tuning
from ops.backends.maca import BACKEND
from ops.discover import descriptors
from test_compiled_kernels import TARGETS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

HOPPER_BYTES = 232448
KINDS = {
    **dict.fromkeys(("x", "mean", "bias"), "*bf16"),
    **dict.fromkeys(("threshold", "scale", "sums"), "*fp32"),
    **dict.fromkeys(("digits", "blocks"), "*i32"),
    **dict.fromkeys(("count", "weight"), "*i8"),
    **dict.fromkeys(("num_tokens", "num_outputs", "stride_digit"), "i32"),
    "k": "fp32",
    "parts": "*fp32",
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size, group", [(3584, 128), (960, 96)])
def test_tiles_take_the_shared_memory_that_their_entries_say(target, size, group):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops.spike_linear.launch import Kernels

    entries = tuning.read(tuning.tune_file("spike_linear", "maca"), BACKEND)[tuning.DEFAULT]
    for launcher in Kernels(size, group, entries).launchers:
        kernel, constants = launcher.kernel, launcher.constants
        if constants.get("HAS_BIAS") is False or constants.get("HAS_MEAN") is False:
            continue
        options = {key: launcher.options[key] for key in ("num_warps", "num_stages")}
        assert options["num_warps"] <= BACKEND.limits.max_num_warps
        y = "*fp32" if constants.get("SPLITS", 1) > 1 and kernel.__name__ == "product" else "*bf16"
        kinds = {name: {**KINDS, "y": y}.get(name) for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[0] == "*"}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        assert compiled.metadata.shared <= launcher.options.get("shared_bytes", BACKEND.limits.shared_memory_bytes)


@pytest.fixture
def gluon():
    """Compiles a Gluon kernel for Hopper, or a skip where Triton is another than the kernels'."""
    import triton

    from ops.spike_linear import hopper

    if not triton.__version__.startswith(hopper.TRITON):
        pytest.skip(f"the Hopper kernels are for Triton {hopper.TRITON}x, this is {triton.__version__}")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    def compile(kernel, kinds, constants, **options):
        signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    return compile


PRODUCTS = [("groups", 28), ("groups_wide", 28), ("groups_wide", 148), ("rows", 28), ("rows_wide", 148)]


@pytest.mark.parametrize("name, num_blocks", PRODUCTS)
def test_hopper_tiles_fit(gluon, name, num_blocks):
    from triton.experimental.gluon import language as gl

    from ops.spike_linear import gluon_hopper

    def tiles(kind, dtype, *block):
        return f"tensordesc<{kind}{list(block)},{gl.NVMMASharedLayout.get_default_for(list(block), dtype)!r}>"

    tile = _entries()[name]
    constants = {**tile, "BLOCKS": num_blocks, "PER_ROW": name.startswith("rows"), "HAS_BIAS": True}
    kinds = {
        **KINDS,
        "weight_tiles": tiles("i8", gl.int8, 128, 128),
        "count_tiles": tiles("i8", gl.int8, tile["TOKENS"], 128),
        "y": tiles("bf16", gl.bfloat16, tile["TOKENS"], 64),
    }
    assert gluon(gluon_hopper.products, kinds, constants, num_warps=4).metadata.shared <= HOPPER_BYTES


@pytest.mark.parametrize(
    "name, num_tokens, num_blocks", [("few", 8, 28), ("few_wide", 16, 28), ("few_deep", 8, 148), ("few_deep", 16, 148)]
)
def test_few_tokens_fit(gluon, name, num_tokens, num_blocks):
    from ops.spike_linear import gluon_stream

    tile = dict(_entries()[name])
    sizes = {size: tile.pop(size) for size in ("ROWS", "AHEAD")}
    constants = dict(BLOCKS=num_blocks, SCALES=num_blocks, **sizes, TOKENS=num_tokens, HAS_BIAS=True)
    compiled = gluon(gluon_stream.few_tokens, {**KINDS, "y": "*bf16"}, constants, **tile)
    assert compiled.metadata.shared <= HOPPER_BYTES


@pytest.mark.parametrize("size, num_warps", [(640, 1), (3584, 2), (32768, 16)])
def test_counting_fits(gluon, size, num_warps):
    from ops.spike_linear.hopper import HopperDigits

    launcher = HopperDigits(size, _entries()["digits_early"], all_digits=True).launchers[1]
    assert launcher.options["num_warps"] == num_warps and launcher.options["launch_pdl"]
    compiled = gluon(launcher.kernel, KINDS, launcher.constants, num_warps=num_warps)
    assert compiled.metadata.shared <= HOPPER_BYTES


@pytest.mark.parametrize(
    "size, num_scales, num_tokens, num_outputs, wide",
    [
        (3584, 28, 200, 3584, False),
        (3584, 28, 4096, 3584, False),
        (3584, 28, 4096, 4608, False),
        (3584, 28, 4096, 37888, True),
        (3584, 28, 8192, 3584, True),
        (18944, 148, 4096, 3584, False),
        (3584, 1, 4096, 4608, False),
        (3584, 1, 8192, 4608, True),
        (3584, 1, 300, 37888, False),
        (3584, 1, 4096, 37888, True),
        (18944, 1, 4096, 3584, False),
    ],
)
def test_tile_by_shape(size, num_scales, num_tokens, num_outputs, wide):
    """On 132 multiprocessors: the wide tile unless its last round leaves many of them idle."""
    from ops.spike_linear.hopper import Many, better_tile

    pytest.importorskip("triton.experimental.gluon")
    entries = _entries()
    many = Many(size, num_scales, entries)
    tile = better_tile(many.tile, many.wide_tile, num_tokens, num_outputs, 132)
    name = "rows" if num_scales == 1 else "groups"
    assert tile is entries[f"{name}_wide" if wide else name]


@pytest.mark.parametrize(
    "num_tokens, size, num_outputs, num_scales, made",
    [
        (8, 3584, 37888, 28, "Few"),
        (9, 3584, 37888, 28, "undivided"),
        (16, 18944, 3584, 1, "Few"),
        (17, 3584, 3584, 28, None),
        (17, 3584, 37888, 28, "Many"),
        (129, 3584, 3584, 1, "Many"),
        (129, 3584, 3580, 1, None),
        (8, 3584, 3584, 56, None),
    ],
)
def test_kernels_by_shape(monkeypatch, num_tokens, size, num_outputs, num_scales, made):
    """On Hopper with 132 multiprocessors. None: the kernels for any device."""
    from ops.spike_linear import hopper
    from ops.spike_linear.launch import Call

    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "_num_multiprocessors", lambda device: 132)
    x = torch.empty(num_tokens, size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(num_outputs, size, dtype=torch.int8, device="meta")
    call = Call(x, weight, None, 3.0, torch.empty(num_outputs, num_scales, 1, device="meta"), None)
    found = hopper.choose(lambda make, *sizes: make.__name__, call)
    assert found == made


def _entries():
    return tuning.read(tuning.tune_file("spike_linear", "cuda"), descriptors()["cuda"])[tuning.DEFAULT]
