"""Kernels of the MetaX files compiled without their hardware, for two stand-ins: an A100, and an AMD GPU of 64 lanes.

A proxy: it shows that the tiles fit 64 KB of shared memory, not that MetaX's compiler takes them.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from ops import tuning
from ops.backends.maca import BACKEND

POINTERS = {
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv", "states", "leaving"), "*bf16"),
    **dict.fromkeys(("log_decay", "dg", "qdq", "sums", "totals", "added", "given", "ends"), "*fp32"),
    **dict.fromkeys(("chunks", "edges"), "*i32"),
}
TARGETS = {"A100": ("cuda", 80, 32), "64 lanes": ("hip", "gfx942", 64)}


def gla_launchers(dtype):
    """(kernel launcher, shared memory that its tune entry says) of every kernel of gla on MetaX, for the 7B model."""
    from ops.gla.kernels import Kernels

    entries = tuning.read(tuning.tune_file("gla", "maca"), BACKEND)[tuning.DEFAULT]
    for launcher in Kernels(7, 4, 128, 128, dtype, entries).launchers:
        entry = entries[launcher.kernel.__name__] if dtype == torch.bfloat16 else entries["wide"]
        launcher.options = {name: launcher.options[name] for name in ("num_warps", "num_stages")}
        yield launcher, entry.get("shared_bytes", BACKEND.limits.shared_memory_bytes)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_gla_takes_the_shared_memory_that_its_entries_say(target, dtype):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    wide = dict.fromkeys((name for name, kind in POINTERS.items() if kind == "*bf16"), "*fp16")
    wide |= dict.fromkeys(("states", "leaving"), "*fp32")
    pointers = POINTERS if dtype == torch.bfloat16 else {**POINTERS, **wide}
    for launcher, shared_bytes in gla_launchers(dtype):
        kernel, constants = launcher.kernel, launcher.constants
        kinds = {**pointers, "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(fn=kernel, signature={name: kinds[name] for name in kernel.arg_names}, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launcher.options)
        assert compiled.metadata.shared <= shared_bytes, kernel.__name__
