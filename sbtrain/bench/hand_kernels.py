"""The kernels of the hand-assembled peer: the best public one for each job on a GPU, plain torch on a CPU.

All take B rows of T tokens, each row one document, and as many key as query heads or fewer (full, window) or exactly as
many (gla). This is the peer that the engine is compared with, so it uses the packages themselves, not `ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sbtrain.config.schema import ModelConfig

IGNORE = -100
CHUNK_TOKENS = 16


@dataclass(frozen=True)
class Kernels:
    """full(q, k, v), window(q, k, v), gla(q, k, v, log_decay) -> [B,T,Hq,D], q [B,T,Hq,D], k and v [B,T,H,D];
    loss(hidden [T,D], weight [V,D], labels [T]) -> mean over the labels that are not IGNORE."""

    full: Callable
    window: Callable
    gla: Callable
    loss: Callable


def kernel_names(device: torch.device) -> dict[str, str]:
    """Job -> what the peer uses for it on this device, to print."""
    if device.type != "cuda":
        return {"all": "plain torch"}
    return {
        "full attention": "cuDNN SDPA",
        "window": "FlexAttention",
        "gla": "fla chunk_gla, heads repeated",
        "loss": "Liger fused linear cross-entropy",
        "the rest": "torch.compile, layer by layer",
        "optimizer": "torch fused AdamW, fp32 masters and gradients",
    }


def kernels_for(model: ModelConfig, seq_len: int, device: torch.device) -> Kernels:
    """The kernels of this device. Raises ValueError when a package that they need on a GPU is missing."""
    return _fast(model, seq_len, device) if device.type == "cuda" else _plain(model, seq_len)


def _fast(model: ModelConfig, seq_len: int, device: torch.device) -> Kernels:
    for package, name in (("fla", "fla-core"), ("liger_kernel", "liger-kernel")):
        if find_spec(package) is None:
            raise ValueError(f"peers=hand needs {name} on a GPU; pip install {name}, or run with peers=engine")
    from fla.ops.gla import chunk_gla
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    mask = create_block_mask(_sees(model.window), None, None, seq_len, seq_len, device=device)
    fused_loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)

    def window(q, k, v):
        return flex_attention(*_heads_first(q, k, v), block_mask=mask, enable_gqa=True).transpose(1, 2)

    return Kernels(
        full=_causal,
        window=window,
        gla=lambda q, k, v, log_decay: chunk_gla(q, k, v, log_decay)[0],
        loss=lambda hidden, weight, labels: fused_loss(weight, hidden, labels),
    )


def _plain(model: ModelConfig, seq_len: int) -> Kernels:
    query, key = torch.arange(seq_len)[:, None], torch.arange(seq_len)
    mask = _sees(model.window)(None, None, query, key)

    def window(q, k, v):
        heads = _heads_first(q, k, v)
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def loss(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE)

    return Kernels(full=_causal, window=window, gla=chunked_gla, loss=loss)


def _sees(window: int) -> Callable:
    def sees(row, head, query, key):
        return (key <= query) & (query - key < window)

    return sees


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*_heads_first(q, k, v), is_causal=True, enable_gqa=True).transpose(1, 2)


def chunked_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Gated linear attention by chunks, in fp32, every pair of tokens of a chunk by itself: slow, for small sizes.

    Per head: S_t = diag(exp(log_decay_t)) S_(t-1) + k_t^T v_t, o_t = q_t S_t / sqrt(D).
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, k, v, log_decay = (x.transpose(1, 2).float() for x in (q, k, v, log_decay))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for start in range(0, q.shape[2], CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        qc, kc, vc, decay = q[:, :, part] * scale, k[:, :, part], v[:, :, part], log_decay[:, :, part].cumsum(2)
        past = torch.ones(qc.shape[2], qc.shape[2], dtype=torch.bool, device=q.device).tril()
        # from key s to query t the state decays by exp(decay_t - decay_s), never more than 1
        between = (decay[:, :, :, None] - decay[:, :, None]).masked_fill(~past[:, :, None], float("-inf")).exp()
        scores = torch.einsum("bhtd,bhsd,bhtsd->bhts", qc, kc, between)
        outputs.append(scores @ vc + (qc * decay.exp()) @ state)
        left = (decay[:, :, -1:] - decay).exp()
        state = decay[:, :, -1].exp()[..., None] * state + (kc * left).transpose(2, 3) @ vc
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype)
