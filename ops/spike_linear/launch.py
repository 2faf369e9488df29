"""Linear layers on spike counts with INT8 weights with Triton; shared by the backends' files."""

from __future__ import annotations

from typing import Mapping

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.launch import Launcher, Prepared
from ops.spike_linear import reference, triton_kernels
from ops.spike_linear.reference import dequantized

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_CHANNELS = 32768
"""A token is one program's, and its sums over channels stay far inside int32."""
NUM_DIGITS = 5
"""Digits in base 256, each of them int8, that any int32 count has at most."""


class Implementation:
    """ops.spike_linear with the tiles of a backend. wider: makes what runs some products better than `Kernels`, see
    hopper.Products."""

    def __init__(self, backend: str, *, wider=None):
        self.prepared, self.wider = Prepared("spike_linear", backend), wider

    def functions(self) -> tuple:
        """What a backend's file holds."""
        return self.accepts, self.spike_linear

    def accepts(self, name: str, x: Tensor, weight: Tensor, bias=None, **options) -> str | None:
        """Why a call cannot run here; None when it can."""
        if weight.dtype != torch.int8:
            return None
        if x.dtype not in DTYPES:
            return "takes bf16, fp16 and fp32"
        if x.shape[-1] > MOST_CHANNELS:
            return f"takes up to {MOST_CHANNELS} channels"
        if options["weight_scale"].dtype != torch.float32:
            return "takes fp32 scales of INT8 weights"
        return None

    def spike_linear(self, x, weight, bias=None, *, k=3.0, weight_scale=None, mean_abs=None):
        """See ops.spike_linear."""
        if weight.dtype != torch.int8 or x.numel() == 0 or len(weight) == 0:
            how = dict(k=k, weight_scale=weight_scale, mean_abs=mean_abs)
            return reference.spike_linear(x, weight, bias, **how)
        return _SpikeLinear.apply(x, weight, bias, k, weight_scale, mean_abs, self)

    def product(self, x, weight, bias, k, weight_scale, mean_abs) -> Tensor:
        """y [tokens, F] of x [tokens, D] and the rest contiguous."""
        sizes = weight.shape[1], weight.shape[1] // weight_scale.shape[1]
        call = Call(x, weight, bias, k, weight_scale, mean_abs)
        if self.wider is not None:
            products = self.wider(self.prepared, call)
            if products is not None:
                return products(call)
        return self.prepared(Kernels, *sizes)(call)


class Call:
    """Tensors of a call, contiguous: x [tokens, D], weight [F, D], scale [F, D / g], bias, mean_abs [tokens]."""

    def __init__(self, x, weight, bias, k, scale, mean_abs):
        self.x, self.weight, self.bias, self.k = x, weight, bias, float(k)
        self.scale, self.mean_abs = scale, mean_abs
        self.num_tokens, self.num_outputs, self.device = len(x), len(weight), x.device

    def empty(self, *shape, dtype) -> Tensor:
        """A new tensor on the device."""
        return torch.empty(shape, dtype=dtype, device=self.device)


class _SpikeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, k, weight_scale, mean_abs, implementation):
        ctx.save_for_backward(weight, weight_scale)
        ctx.dtype, ctx.has_bias = x.dtype, bias is not None
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        mean_abs = None if mean_abs is None else mean_abs.reshape(-1).contiguous()
        weight, scale = weight.contiguous(), weight_scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        y = implementation.product(tokens, weight, bias, k, scale, mean_abs)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        weight, weight_scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ dequantized(weight, weight_scale).to(ctx.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad_y.flatten(0, -2).sum(0)
        return grad_x, None, grad_bias, None, None, None, None


class Digits:
    """The kernel that turns x [tokens, size] into lowest digits, thresholds and what says where there are more.

    depth: channels of a block. all_digits: counts are [5, tokens, size]. launchers: without and with means of whole
    tokens.
    """

    def __init__(self, size: int, depth: int, entry: Mapping, *, all_digits: bool = False):
        block = max(triton.next_power_of_2(size), 32)
        self.size, self.planes, self.words = size, NUM_DIGITS if all_digits else 1, triton.cdiv(size, 32 * depth)
        num_warps = min(entry["num_warps"], max(1, block // entry["NUMBERS"]))
        constants = dict(SIZE=size, DEPTH=depth, BLOCK=block, WORDS=self.words, ALL=all_digits)
        self.launchers = [
            Launcher(
                triton_kernels.lowest_digits, {**constants, "HAS_MEAN": has_mean}, {**entry, "num_warps": num_warps}
            )
            for has_mean in (False, True)
        ]

    def __call__(self, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(count int8 [planes, tokens, size], threshold fp32 [tokens], digits int32 [tokens], blocks int32)."""
        x, mean = call.x, call.mean_abs
        count = call.empty(self.planes, call.num_tokens, self.size, dtype=torch.int8)
        threshold = call.empty(call.num_tokens, dtype=torch.float32)
        digits = call.empty(call.num_tokens, dtype=torch.int32)
        blocks = call.empty(call.num_tokens, self.words, dtype=torch.int32)
        launcher, mean = self.launchers[mean is not None], x if mean is None else mean
        launcher((call.num_tokens,), x, mean, count, threshold, digits, blocks, call.k)
        return count, threshold, digits, blocks


class Kernels:
    """The kernels for weights with `size` inputs in groups of `group`. launchers: all of them."""

    def __init__(self, size: int, group: int, entries: Mapping[str, Mapping]):
        self.depth = min(128, group & -group)
        self.digits = Digits(size, self.depth, entries["digits"])
        common = dict(SIZE=size, GROUP=group, DEPTH=self.depth, WORDS=self.digits.words)
        self.tiles, self.launchers = {}, [*self.digits.launchers]
        self._products, self._sums = {}, {}
        for name in ("product", "product_few", "product_some"):
            tile = entries[name]
            splits = min(tile["SPLITS"], size // group)
            self.tiles[name] = {**tile, "SPLITS": splits}
            for has_bias in (False, True):
                constants = dict(common, SPLITS=splits, HAS_BIAS=has_bias and splits == 1)
                self._products[name, has_bias] = Launcher(triton_kernels.product, constants, tile)
                constants = dict(SPLITS=splits, HAS_BIAS=has_bias)
                self._sums[name, has_bias] = Launcher(triton_kernels.add_splits, constants, entries["add_splits"])
        self.block = entries["add_splits"]["BLOCK"]
        self.launchers += [*self._products.values(), *self._sums.values()]

    def _product_of(self, num_tokens: int) -> str:
        if num_tokens <= self.tiles["product_few"]["TOKENS"]:
            return "product_few"
        return "product_some" if num_tokens <= 2 * self.tiles["product_some"]["TOKENS"] else "product"

    def __call__(self, call: Call) -> Tensor:
        """y [tokens, F] in x's dtype."""
        name = self._product_of(call.num_tokens)
        tile, which = self.tiles[name], (name, call.bias is not None)
        count, threshold, digits, blocks = self.digits(call)
        shape = call.num_tokens, call.num_outputs
        y, bias = call.empty(*shape, dtype=call.x.dtype), call.x if call.bias is None else call.bias
        splits = tile["SPLITS"]
        sums = y if splits == 1 else call.empty(splits, *shape, dtype=torch.float32)
        grid = (triton.cdiv(shape[1], tile["ROWS"]) * triton.cdiv(shape[0], tile["TOKENS"]), splits)
        inputs = (call.x, count, threshold, digits, blocks, call.weight, call.scale, bias)
        self._products[which](grid, *inputs, sums, *shape)
        if splits > 1:
            grid = (triton.cdiv(shape[1], self.block), shape[0])
            self._sums[which](grid, sums, threshold, bias, y, *shape)
        return y
