"""Launches of the Hopper kernels (gluon_hopper.py, gluon_stream.py) for the products that they take.

Gluon's interface moves between Triton's releases, so they run with the one they were written for.
"""

from __future__ import annotations

from functools import cache
from typing import Mapping

import torch
import triton
from torch import Tensor

from ops.launch import Launcher, Prepared
from ops.spike_linear.launch import NUM_DIGITS, Call, Digits

TRITON = "3.6."
DEPTH = 128
"""Channels of a block and of a group."""
PLAIN_TOKENS = 128
"""Up to so many tokens, few outputs are products in parts: tiles of them all would leave multiprocessors idle."""
WIDE_GAIN = 1.08
"""How much faster a wide tile's numbers are computed than another's, on an H200."""


def choose(prepared: Prepared, call: Call):
    """What computes a call's product here, or None: Few or Many."""
    size, num_scales = call.weight.shape[1], call.scale.shape[1]
    if size % DEPTH or num_scales not in (1, size // DEPTH) or not is_hopper(call.device):
        return None
    if call.num_tokens <= Few.most_tokens:
        return prepared(Few, size, num_scales)
    if call.num_tokens <= PLAIN_TOKENS and call.num_outputs < DEPTH * _num_multiprocessors(call.device):
        return None
    if call.x.dtype == torch.float32 or call.num_outputs % 8 or call.weight.data_ptr() % 16:
        return None
    return prepared(Many, size, num_scales)


@cache
def is_hopper(device) -> bool:
    """Whether these kernels were written for the device and for this Triton."""
    known = triton.__version__.startswith(TRITON) and device.type == "cuda"
    return known and torch.cuda.get_device_capability(device)[0] == 9


class HopperDigits(Digits):
    """Digits by gluon_digits, for blocks of DEPTH channels; it starts while the kernel before it ends."""

    def __init__(self, size: int, entry: Mapping, *, all_digits: bool = False):
        from ops.spike_linear import gluon_digits

        self.size, self.planes, self.words = size, NUM_DIGITS if all_digits else 1, triton.cdiv(size, 32 * DEPTH)
        num_warps = min(entry["num_warps"], max(1, triton.next_power_of_2(triton.cdiv(size, entry["NUMBERS"]))))
        constants = dict(SIZE=size, WORDS=self.words, ALL=all_digits)
        options = {"launch_pdl": True, **{name: entry[name] for name in entry if not name.isupper()}}
        options = {**options, "num_warps": num_warps}
        self.launchers = [
            Launcher(gluon_digits.lowest_digits, {**constants, "HAS_MEAN": has_mean}, options)
            for has_mean in (False, True)
        ]


class Few:
    """Up to 16 tokens: weights are streamed once. launchers: all of them."""

    most_tokens = 16

    def __init__(self, size: int, num_scales: int, entries: Mapping[str, Mapping]):
        from ops.spike_linear import gluon_stream

        self.size = size
        self.digits = HopperDigits(size, entries["digits_few"], all_digits=True)
        self.tiles = {8: entries["few"], 16: entries["few_wide"]}
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
        self.size, self.digits = size, HopperDigits(size, entries["digits_many"])
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
            _tiles_of(call.weight, [tile["ROWS"], DEPTH]), _tiles_of(count[0], [tile["TOKENS"], DEPTH]),
            _tiles_of(y, [tile["TOKENS"], 64]), call.x, call.weight, call.scale, threshold, digits, blocks,
            call.x if call.bias is None else call.bias, shape[1], shape[0],
            BLOCKS=self.size // DEPTH, ACROSS=tile.get("ACROSS", 0), PER_ROW=self.per_row, HAS_BIAS=call.bias is not None,
            num_warps=4, launch_pdl=True, **{name: tile[name] for name in ("ROWS", "TOKENS", "SIZE", "BAND", "STAGES")},
        )  # fmt: skip
        return y


def num_tiles(tile: Mapping, num_tokens: int, num_outputs: int) -> int:
    """Tiles of an output [num_tokens, num_outputs]."""
    return triton.cdiv(num_outputs, tile["ROWS"]) * triton.cdiv(num_tokens, tile["TOKENS"])


def better_tile(tile: Mapping, wide: Mapping, num_tokens: int, num_outputs: int, num_programs: int) -> Mapping:
    """The wide tile where less of the last round's time is lost on it than it gains over the other."""
    rounds, wide_rounds = (triton.cdiv(num_tiles(x, num_tokens, num_outputs), num_programs) for x in (tile, wide))
    area, wide_area = (x["ROWS"] * x["TOKENS"] for x in (tile, wide))
    return wide if wide_rounds * wide_area < WIDE_GAIN * rounds * area else tile


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
