"""Gated delta rule in plain torch: exact chunk form with one triangular solve per chunk (the WY representation).

With b the running sum of log_decay and D_ij = exp(b_i - b_j) for j <= i, all of a chunk's writes are
u = (I + tril(beta D (k k^T), -1))^{-1} beta (v - exp(b) k S_in): linear in the entering state S_in.
Shapes inside: q [B, H, M, C, G, K], k [B, H, M, C, K] with H states, G query heads of each, M chunks of C tokens; keys
and queries that several states share are repeated.
"""

from __future__ import annotations

import torch

from ops import chunks

CHUNK_TOKENS = 64


def gated_delta_rule(
    q,
    k,
    v,
    log_decay,
    beta,
    *,
    scale=None,
    initial_state=None,
    cu_seqlens=None,
    output_final_state=False,
    qk_l2norm=False,
):
    """See ops.gated_delta_rule."""
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, log_decay, beta = (x.to(exact) for x in (q, k, v, log_decay, beta))
    if qk_l2norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    k, q = (x.repeat_interleave(max(1, v.shape[2] // x.shape[2]), 2) for x in (k, q))
    tensors = (q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, log_decay, beta)
    state = None if initial_state is None else initial_state.to(exact)
    stateful = initial_state is not None or output_final_state
    if stateful and cu_seqlens is not None and len(cu_seqlens) > 2:
        o, final = chunks.one_by_one(_rows, tensors, state, cu_seqlens)
    else:
        o, final = _rows(*tensors, state, chunks.packed_ids(cu_seqlens))
    return o.to(dtype), final if output_final_state else None


def _rows(q, k, v, log_decay, beta, state, ids=None):
    """o [B, T, Hq, V] and final state [B, H, K, V] of rows; state enters at the first token, for its document."""
    num_rows, num_tokens, num_heads, key_size = k.shape
    if state is None:
        state = k.new_zeros(num_rows, num_heads, key_size, v.shape[-1])
    if num_tokens == 0:
        return v.new_zeros(num_rows, 0, q.shape[2], v.shape[-1]), state
    q = q.unflatten(2, (num_heads, -1)).transpose(1, 2)
    k, v, log_decay, beta = (x.transpose(1, 2) for x in (k, v, log_decay, beta))
    tensors, ids = chunks.into_chunks((q, k, v, log_decay, beta), ids, CHUNK_TOKENS)
    o, state = _chunks(*tensors, state, ids)
    return o.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2).flatten(2, 3), state


def _chunks(q, k, v, log_decay, beta, state, ids):
    """o [B, H, M, C, G, V] and the state after the last chunk. ids [M, C] or None."""
    b = log_decay.cumsum(3)
    total = b[..., -1]
    hidden = torch.ones(q.shape[3], q.shape[3], dtype=torch.bool, device=q.device).triu(1)
    enter, leave = b, total[..., None] - b
    if ids is not None:
        cuts = chunks.cut(ids)
        hidden = hidden | (ids[:, :, None] != ids[:, None, :])
        enter, leave = enter.masked_fill(cuts.enter, -torch.inf), leave.masked_fill(cuts.leave, -torch.inf)
        total = total.masked_fill(cuts.through, -torch.inf)
    decay = (b[..., :, None] - b[..., None, :]).masked_fill(hidden, -torch.inf).exp()
    enter, leave, total = enter.exp()[..., None], leave.exp()[..., None], total.exp()[..., None, None]
    recalled = (k @ k.mT * decay * beta[..., None]).tril(-1)
    writes = torch.linalg.solve_triangular(
        recalled, torch.cat([v, k * enter], -1) * beta[..., None], upper=False, unitriangular=True
    )
    written, erased = writes.split([v.shape[-1], k.shape[-1]], -1)
    scores = (q.flatten(3, 4) @ k.mT).unflatten(3, q.shape[3:5]) * decay[..., None, :]
    q = q * enter[..., None, :]
    k = k * leave
    outputs = []
    for m in range(q.shape[2]):
        u = written[:, :, m] - erased[:, :, m] @ state
        outputs.append(q[:, :, m].flatten(2, 3) @ state + scores[:, :, m].flatten(2, 3) @ u)
        state = total[:, :, m] * state + k[:, :, m].mT @ u
    return torch.stack(outputs, 2).unflatten(3, q.shape[3:5]), state
