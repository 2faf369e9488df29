"""Launches of the Hopper kernels (gluon_digits.py, gluon_hopper.py, gluon_stream.py) for the products that they take.

Gluon's interface moves between Triton's releases, so they run with the one they were written for.
"""

from __future__ import annotations

from functools import cache
from typing import Mapping

import torch
import triton
from torch import Tensor

from ops.launch import Launcher, Prepared
from ops.spike_linear.launch import NUM_DIGITS, Call, Digits, Kernels

TRITON = "3.6."
DEPTH = 128
"""Channels of a block and of a group."""
ROWS = 128
"""Outputs of a tile of many tokens."""
DEEP_BLOCKS = 64
"""A row of more blocks is deep. Measured on an H200 with 28 and with 148."""
PLAIN_TOKENS = 128
"""Up to so many tokens, few outputs are products in parts: tiles of them all would leave multiprocessors idle."""
STREAMED_TOKENS = 8
"""Up to so many tokens, streaming weights is the fastest for any number of outputs; beyond, up to FILLING_OUTPUTS."""
FILLING_OUTPUTS = 256
"""Outputs to a multiprocessor with which plain tiles of few tokens keep it busy without dividing the channels."""
WIDE_GAIN = 1.07
"""How much faster a wide tile's numbers are computed than another's: 1.01 to 1.17 on an H200, most of them near this. A
wide tile reads weights half as often."""


def choose(prepared: Prepared, call: Call):
    """What computes a call's product here: Few, Many, or Kernels; None where it is Kernels as for other devices."""
    size, num_scales = call.weight.shape[1], call.scale.shape[1]
    if size % DEPTH or num_scales not in (1, size // DEPTH) or not is_hopper(call.device):
        return None
    outputs_each = call.num_outputs / _num_multiprocessors(call.device)
    if STREAMED_TOKENS < call.num_tokens <= Few.most_tokens and outputs_each >= FILLING_OUTPUTS:
        return prepared(undivided, size, size // num_scales)
    if call.num_tokens <= Few.most_tokens:
        return prepared(Few, size, num_scales)
    if call.num_tokens <= PLAIN_TOKENS and outputs_each < ROWS:
        return None
    if call.x.dtype == torch.float32 or call.num_outputs % 8 or call.weight.data_ptr() % 16:
        return None
    return prepared(Many, size, num_scales)


@cache
def is_hopper(device) -> bool:
    """Whether these kernels were written for the device and for this Triton."""
    known = triton.__version__.startswith(TRITON) and device.type == "cuda"
    return known and torch.cuda.get_device_capability(device)[0] == 9


def undivided(size: int, group: int, entries: Mapping[str, Mapping]) -> Kernels:
    """The plain kernels for few tokens and so many outputs that the channels need not be divided among programs."""
    return Kernels(size, group, {**entries, "product_few": entries["product_undivided"]})


class HopperDigits(Digits):
    """Digits by gluon_digits, for blocks of DEPTH channels."""

    def __init__(self, size: int, entry: Mapping, *, all_digits: bool = False):
        from ops.spike_linear import gluon_digits

        self.size, self.planes, self.words = size, NUM_DIGITS if all_digits else 1, triton.cdiv(size, 32 * DEPTH)
        num_warps = min(entry["num_warps"], max(1, triton.next_power_of_2(triton.cdiv(size, entry["NUMBERS"]))))
        constants = dict(SIZE=size, WORDS=self.words, ALL=all_digits)
        tile = {**entry, "num_warps": num_warps, "launch_pdl": True}
        self.launchers = [
            Launcher(gluon_digits.lowest_digits, {**constants, "HAS_MEAN": has_mean}, tile)
            for has_mean in (False, True)
        ]


class Few:
    """Up to 16 tokens: weights are streamed once. launchers: all of them."""

    most_tokens = 16

    def __init__(self, size: int, num_scales: int, entries: Mapping[str, Mapping]):
        from ops.spike_linear import gluon_stream

        self.size = size
        self.digits = HopperDigits(size, entries["digits_early"], all_digits=True)
        deep = size // DEPTH > DEEP_BLOCKS
        self.tiles = {8: entries["few_deep" if deep else "few"], 16: entries["few_deep" if deep else "few_wide"]}
        self._products = {
            (num_tokens, has_bias): Launcher(
                gluon_stream.few_tokens,
                dict(BLOCKS=size // DEPTH, SCALES=num_scales, TOKENS=num_tokens, HAS_BIAS=has_bias),
                {**tile, "launch_pdl": True},
            )
            for num_tokens, tile in self.tiles.items()
            for has_bias in (False, True)
        }
        self.launchers = [*self.digits.launchers, *self._products.values()]

    def __call__(self, call: Call) -> Tensor:
        """y [tokens, F] in x's dtype."""
        count, threshold, digits, _ = self.digits(call)
        y = call.empty(call.num_tokens, call.num_outputs, dtype=call.x.dtype)
        width = 8 if call.num_tokens <= 8 else 16
        launcher = self._products[width, call.bias is not None]
        bias = call.x if call.bias is None else call.bias
        inputs = (call.weight, count, call.scale, threshold, digits, bias)
        grid = (triton.cdiv(call.num_outputs, self.tiles[width]["ROWS"]),)
        launcher(grid, *inputs, y, call.num_outputs, call.num_tokens, call.num_tokens * self.size)
        return y


class Many:
    """More tokens: tiles through the tensor memory accelerator, one program on every multiprocessor."""

    def __init__(self, size: int, num_scales: int, entries: Mapping[str, Mapping]):
        self.size, self.digits = size, HopperDigits(size, entries["digits_early"])
        self.per_row = num_scales == 1
        name = "rows" if self.per_row else "groups"
        self.tile, self.wide_tile = entries[name], entries[f"{name}_wide"]
        self.launchers = self.digits.launchers

    def __call__(self, call: Call) -> Tensor:
        """y [tokens, F] in x's dtype."""
        from ops.spike_linear import gluon_hopper

        num_programs, shape = _num_multiprocessors(call.device), (call.num_tokens, call.num_outputs)
        tile = better_tile(self.tile, self.wide_tile, *shape, num_programs)
        count, threshold, digits, blocks = self.digits(call)
        y = call.empty(*shape, dtype=call.x.dtype)
        gluon_hopper.products[(min(num_tiles(tile, *shape), num_programs),)](
            _tiles_of(call.weight, [ROWS, DEPTH]), _tiles_of(count[0], [tile["TOKENS"], DEPTH]),
            _tiles_of(y, [tile["TOKENS"], 64]), call.x, call.weight, call.scale, threshold, digits, blocks,
            call.x if call.bias is None else call.bias, shape[1], shape[0],
            BLOCKS=self.size // DEPTH, **tile, PER_ROW=self.per_row, HAS_BIAS=call.bias is not None,
            num_warps=4, launch_pdl=True,
        )  # fmt: skip
        return y


def num_tiles(tile: Mapping, num_tokens: int, num_outputs: int) -> int:
    """Tiles of an output [num_tokens, num_outputs]."""
    return triton.cdiv(num_outputs, ROWS) * triton.cdiv(num_tokens, tile["TOKENS"])


def better_tile(tile: Mapping, wide: Mapping, num_tokens: int, num_outputs: int, num_programs: int) -> Mapping:
    """The wide tile where less of the last round's time is lost on it than it gains over the other."""
    rounds, wide_rounds = (triton.cdiv(num_tiles(x, num_tokens, num_outputs), num_programs) for x in (tile, wide))
    return wide if wide_rounds * wide["TOKENS"] < WIDE_GAIN * rounds * tile["TOKENS"] else tile


@cache
def _num_multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles_of(x: Tensor, block: list):
    """A matrix as a descriptor of its blocks."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(*block, x.element_size()))


@cache
def _layout(num_rows: int, num_columns: int, num_bytes: int):
    from triton.experimental.gluon import language as gl

    dtype = gl.int8 if num_bytes == 1 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([num_rows, num_columns], dtype)
