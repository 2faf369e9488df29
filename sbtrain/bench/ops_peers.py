"""Peers of the ops: public kernels for the same work, each optional. The only file of `bench.py ops` that imports them.

Inputs that a package wants in another form (heads repeated, halves apart, tables of cosines) are brought into it
beforehand, so its kernels are timed and not that conversion.
"""

from __future__ import annotations

from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sbtrain.bench.ops_case import Inputs, Version
from sbtrain.bench.ops_flex import flex_version

Call = Callable[[Inputs], tuple[Tensor, ...]]


def gla_peers() -> tuple[Version, ...]:
    """fla, on heads repeated beforehand."""

    def load() -> Call:
        from fla.ops.gla import chunk_gla

        return lambda x: (chunk_gla(x["q"], x["k"], x["v"], x["log_decay"])[0],)

    return (Version("fla", load, _repeat("k", "v", "log_decay")),)


def gated_delta_rule_peers() -> tuple[Version, ...]:
    """fla; more value than key heads are its own layout, more query heads are repeated beforehand."""

    def load() -> Call:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return lambda x: (chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["log_decay"], x["beta"])[0],)

    def prepare(inputs: Inputs) -> Inputs:
        if inputs["q"].shape[2] > inputs["k"].shape[2]:
            return _repeat("k", "v", "log_decay", "beta")(inputs)
        return inputs

    return (Version("fla", load, prepare),)


def attention_peers(window: Optional[int], *, documents: bool = False, sinks: bool = False) -> tuple[Version, ...]:
    """FlexAttention everywhere, cuDNN and flash_attn where they know the mask."""
    versions = [flex_version(window)]
    if window is None and not documents and not sinks:
        versions.append(Version("cuDNN SDPA", lambda: _cudnn))
    if not sinks:
        versions.append(Version("flash_attn", lambda: _flash_attn(window)))
    return tuple(versions)


def _cudnn(x: Inputs) -> tuple[Tensor, ...]:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2),)


def _flash_attn(window: Optional[int]) -> Call:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options = {"causal": True, "window_size": (-1 if window is None else window - 1, 0), "deterministic": True}

    def call(x: Inputs) -> tuple[Tensor, ...]:
        if "cu_seqlens" not in x:
            return (flash_attn_func(x["q"], x["k"], x["v"], **options),)
        edges, longest = x["cu_seqlens"], x["q"].shape[1]
        return (flash_attn_varlen_func(*(x[n][0] for n in "qkv"), edges, edges, longest, longest, **options)[None],)

    return call


def linear_cross_entropy_peers() -> tuple[Version, ...]:
    """Liger with fp32 accumulation, and plain torch with all logits."""

    def load_liger() -> Call:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        return lambda x: (loss(x["weight"], x["hidden"], x["labels"]),)

    def plain(x: Inputs) -> tuple[Tensor, ...]:
        return (F.cross_entropy(F.linear(x["hidden"], x["weight"]).float(), x["labels"]),)

    return (Version("Liger", load_liger), Version("torch", lambda: plain, gpu_only=False))


def rms_norm_peers(eps: float) -> tuple[Version, ...]:
    """Liger and torch."""

    def load_liger() -> Call:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x: (LigerRMSNormFunction.apply(x["x"], x["weight"], eps, 0.0, "llama", False),)

    def plain(x: Inputs) -> tuple[Tensor, ...]:
        return (F.rms_norm(x["x"], x["weight"].shape, x["weight"], eps),)

    return (Version("Liger", load_liger), Version("torch", lambda: plain, gpu_only=False))


def add_rms_norm_peers(eps: float) -> tuple[Version, ...]:
    """The same with the residual added first: (normalized, sum)."""

    def load_liger() -> Call:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x: LigerFusedAddRMSNormFunction.apply(x["x"], x["residual"], x["weight"], eps)

    def plain(x: Inputs) -> tuple[Tensor, ...]:
        total = x["x"] + x["residual"]
        return F.rms_norm(total, x["weight"].shape, x["weight"], eps), total

    return (Version("Liger", load_liger), Version("torch", lambda: plain, gpu_only=False))


def rope_peers() -> tuple[Version, ...]:
    """Liger, which turns queries and keys in place, with tables of cosines and sines made beforehand."""

    def load() -> Call:
        from liger_kernel.ops.rope import LigerRopeFunction

        def call(x: Inputs) -> tuple[Tensor, ...]:
            turned = LigerRopeFunction.apply(x["q"].transpose(1, 2), x["k"].transpose(1, 2), x["cos"], x["sin"])
            return tuple(y.transpose(1, 2) for y in turned)

        return call

    def prepare(inputs: Inputs) -> Inputs:
        angles = inputs["positions"][..., None] * inputs["inv_freq"].detach()
        angles = torch.cat([angles, angles], -1)
        return {"q": inputs["q"], "k": inputs["k"], "cos": angles.cos(), "sin": angles.sin()}

    return (Version("Liger", load, prepare, in_place=True),)


def swiglu_peers() -> tuple[Version, ...]:
    """Liger on separate halves, and torch."""

    def load_liger() -> Call:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return lambda x: (LigerSiLUMulFunction.apply(x["gate"], x["up"]),)

    def halves(inputs: Inputs) -> Inputs:
        gate, up = (x.contiguous() for x in inputs["gate_up"].chunk(2, -1))
        return {"gate": gate, "up": up}

    def plain(x: Inputs) -> tuple[Tensor, ...]:
        gate, up = x["gate_up"].chunk(2, -1)
        return (F.silu(gate) * up,)

    return (Version("Liger", load_liger, halves), Version("torch", lambda: plain, gpu_only=False))


def grouped_mm_peers() -> tuple[Version, ...]:
    """torch's grouped product."""

    def call(x: Inputs) -> tuple[Tensor, ...]:
        return (torch._grouped_mm(x["x"], x["weight"].transpose(1, 2), offs=x["offsets"][1:]),)

    return (Version("torch", lambda: call),)


def int8_linear_peers() -> tuple[Version, ...]:
    """torch's product with a weight of x's dtype."""

    def prepare(inputs: Inputs) -> Inputs:
        return {"x": inputs["x"], "weight": inputs["weight"].to(inputs["x"].dtype)}

    def call(x: Inputs) -> tuple[Tensor, ...]:
        return (x["x"] @ x["weight"].T,)

    return (Version("torch matmul", lambda: call, prepare),)


def _repeat(*names: str) -> Callable[[Inputs], Inputs]:
    """prepare: these tensors [B, T, Hkv, ...] repeated to the query heads of q."""

    def prepare(inputs: Inputs) -> Inputs:
        group = inputs["q"].shape[2] // inputs["k"].shape[2]
        return {**inputs, **{name: inputs[name].repeat_interleave(group, 2) for name in names}}

    return prepare
