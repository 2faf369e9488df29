"""What a state that enters a shard from the left adds to gated linear attention: the rest does not wait for it.

A sequence-parallel shard computes all but this without its neighbor. Per key head, for the tokens t of document 0:

    o'_t = o_t + scale * (q_t * exp(b_t)) state_in        b_t = log_decay_0 + ... + log_decay_t

so that gla_carry of gla's outputs is gla_output, with the same gradients. Tokens of other documents stay as they are.
Source: the equation of ops.gla, unrolled from its initial state.

Tolerances against float64, relative norm of outputs and of every gradient: fp32 1e-5 on the CPU, 1e-4 on a GPU; bf16
1e-2. log_decay must be finite and <= 0: then nothing overflows, however strong it is.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ops import documents
from ops.registry import implementation

__all__ = ["gla_carry"]


def gla_carry(
    o: Tensor,
    q: Tensor,
    log_decay: Tensor,
    state_in: Tensor,
    *,
    cu_seqlens: Optional[Tensor] = None,
    scale: Optional[float] = None,
) -> Tensor:
    """o [1, T, Hq, V] of one shard with the part of state_in [Hkv, K, V] (fp32), which enters its document 0.

    o in its dtype, from ops.gla on the same shard; q [1, T, Hq, K]; log_decay [1, T, Hkv, K], best in fp32. cu_seqlens
    describes the shard as for ops.gla_state: document 0 is the one that enters from the left, empty where another
    starts at the first token. scale defaults to 1/sqrt(K) and must be that of ops.gla.

    o is used up: the result may lie in its memory. Everything is differentiable; the result depends on every input for
    autograd also where document 0 is empty, with gradients of zero. Raises ValueError on shapes that do not fit.
    """
    _check(o, q, log_decay, state_in, cu_seqlens)
    run = implementation("gla_carry", "gla_carry", q)
    return run(o, q, log_decay, state_in, cu_seqlens=cu_seqlens, scale=scale)


def _check(o, q, log_decay, state_in, cu_seqlens) -> None:
    num_rows, num_tokens, num_heads, key_size = q.shape
    if num_rows != 1:
        raise ValueError(f"a shard is one row (B = 1), got B = {num_rows}; concatenate the rows and give cu_seqlens")
    if o.shape[:3] != q.shape[:3]:
        raise ValueError(f"o must be [1, T, Hq, V] like q {list(q.shape)}, got {list(o.shape)}")
    state_heads = log_decay.shape[2]
    if log_decay.shape != (1, num_tokens, state_heads, key_size) or num_heads % state_heads:
        raise ValueError(
            f"log_decay must be [1, T, Hkv, K], Hkv a divisor of q's heads {list(q.shape)}, got {list(log_decay.shape)}"
        )
    shape = (state_heads, key_size, o.shape[3])
    if state_in.shape != shape:
        raise ValueError(f"state_in must be {list(shape)}, got {list(state_in.shape)}")
    documents.check(cu_seqlens, num_rows=num_rows, num_tokens=num_tokens)
