"""Launching a Triton kernel again without working out again which compiled form the arguments ask for.

Triton's own `kernel[grid](...)` looks at every argument of every call, which takes longer than a small kernel runs.
What it would find depends on the tensors' dtypes and 16-byte alignment and on the constants alone, so the compiled
kernel is kept under those.
"""

from __future__ import annotations

from typing import Mapping

import torch
import triton
from triton.runtime.jit import JITFunction

_DIRECT_SINCE = (3, 4)
"""Triton from here on takes constants along with the other arguments when a compiled kernel is called."""

_RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])


class Launcher:
    """One kernel with its constants and tile; called with a grid and what is left of its arguments.

    Those are tensors and floats, in the kernel's order; its constants come last in its signature. tile: sizes, which
    are constants where the constants do not have them already, and launch options (see ops/tuning.py).
    """

    def __init__(self, kernel, constants: Mapping, tile: Mapping):
        known = {**tile, **constants}
        self.kernel, self.constants = kernel, {name: known[name] for name in kernel.arg_names if name in known}
        self.options = {name: value for name, value in tile.items() if not name.isupper()}
        self._compiled: dict = {}
        self._direct = isinstance(kernel, JITFunction) and _RELEASE >= _DIRECT_SINCE
        self._values = tuple(self.constants.values())

    def __call__(self, grid: tuple, *arguments) -> None:
        if not self._direct:
            self.kernel[grid](*arguments, **self.constants, **self.options)
            return
        key = (
            torch.cuda.current_device(),
            *((x.dtype, x.data_ptr() % 16 == 0) for x in arguments if not isinstance(x, float)),
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.kernel[grid](*arguments, **self.constants, **self.options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *self._values)
