"""Launching a Triton kernel again without working out again which compiled form the arguments ask for.

Triton's own `kernel[grid](...)` looks at every argument of every call, which takes longer than a small kernel runs.
What it would find depends on the tensors' dtypes and 16-byte alignment, on a few properties of the integers, and on the
constants alone, so the compiled kernel is kept under those.
"""

from __future__ import annotations

from typing import Callable, Mapping

import torch
import triton
from triton.runtime.jit import JITFunction

from ops.tuning import tiles

_DIRECT_SINCE = (3, 4)
"""Triton from here on takes constants along with the other arguments when a compiled kernel is called."""

_RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])


class Launcher:
    """One kernel with its constants and tile; called with a grid and what is left of its arguments.

    Those are tensors, floats and integers, in the kernel's order; its constants come last in its signature. tile:
    sizes, which are constants where the constants do not have them already, and launch options (see ops/tuning.py).
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
        key = (torch.cuda.current_device(), *map(_form, arguments))
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.kernel[grid](*arguments, **self.constants, **self.options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *self._values)


class Prepared:
    """Launchers of an op on a backend, made once for given sizes and the present tiles.

    Other tiles (ops.tuning.trying, save_tiles) come as another mapping; what was made for the old ones is dropped.
    """

    def __init__(self, op: str, backend: str):
        self.op, self.backend = op, backend
        self._tiles: object = None
        self._made: dict = {}

    def __call__(self, make: Callable, *sizes):
        """make(*sizes, tiles), or what it returned before. sizes: hashable, and few over a run."""
        current = tiles(self.op, self.backend)
        if current is not self._tiles:
            self._tiles, self._made = current, {}
        key = (make, *sizes)
        if key not in self._made:
            self._made[key] = make(*sizes, current)
        return self._made[key]


def _form(argument) -> object:
    """What Triton compiles into a kernel about an argument that is no constant: of floats, nothing."""
    kind = type(argument)
    if kind is float:
        return None
    if kind is int:
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if kind is bool:
        raise TypeError("a kernel's flags are constants of its Launcher, not arguments")
    return argument.dtype, argument.data_ptr() % 16 == 0
