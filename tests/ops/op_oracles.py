"""Independent float64 oracles for the ops: token loops and dense softmax, nothing shared with ops/."""

from __future__ import annotations

import torch


def spans(cu_seqlens, num_tokens):
    bounds = [0, num_tokens] if cu_seqlens is None else [int(edge) for edge in cu_seqlens]
    return list(zip(bounds, bounds[1:]))


def cu(*edges):
    return torch.tensor(edges, dtype=torch.int32)


def per_query_head(q, *tensors):
    """Tensors [T, Hkv, ...] repeated to q's heads."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in tensors]


def gla(q, k, v, log_decay, *, cu_seqlens=None, initial_state=None, scale=None):
    """(o [1, T, Hq, V], final [N, Hkv, K, V]), one token at a time."""
    group = q.shape[2] // k.shape[2]
    q = q[0] * (q.shape[-1] ** -0.5 if scale is None else scale)
    k, v, log_decay = per_query_head(q, k[0], v[0], log_decay[0])
    outputs, finals = [], []
    for n, (start, end) in enumerate(spans(cu_seqlens, len(q))):
        state = q.new_zeros(q.shape[1], k.shape[2], v.shape[2])
        if initial_state is not None:
            state = initial_state[n].repeat_interleave(group, 0)
        for t in range(start, end):
            state = log_decay[t].exp()[:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
            outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
        finals.append(state[::group])
    return torch.stack(outputs)[None], torch.stack(finals)


def gated_delta_rule(q, k, v, log_decay, beta, *, cu_seqlens=None, initial_state=None, qk_l2norm=False):
    """(o [1, T, H, V], final [N, Hv, K, V]) like gla; H = max(Hq, Hv)."""
    heads, num_states = max(q.shape[2], v.shape[2]), v.shape[2]
    if qk_l2norm:
        q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k, v, log_decay, beta = (x[0].repeat_interleave(heads // x.shape[2], 1) for x in (q, k, v, log_decay, beta))
    q = q * q.shape[-1] ** -0.5
    outputs, finals = [], []
    for n, (start, end) in enumerate(spans(cu_seqlens, len(q))):
        state = q.new_zeros(heads, k.shape[2], v.shape[2])
        if initial_state is not None:
            state = initial_state[n].repeat_interleave(heads // num_states, 0)
        for t in range(start, end):
            state = log_decay[t].exp()[:, None, None] * state
            write = beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
            state = state + k[t][:, :, None] * write[:, None, :]
            outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
        finals.append(state[:: heads // num_states])
    return torch.stack(outputs)[None], torch.stack(finals)


def attention(q, k, v, *, window=None, cu_seqlens=None, sink_k=None, sink_v=None, scale=None):
    """(o [1, T, Hq, V], lse [1, T, Hq]) by one dense masked softmax."""
    num_tokens, num_sinks = q.shape[1], 0 if sink_k is None else len(sink_k)
    seen = torch.zeros(num_tokens, num_sinks + num_tokens, dtype=torch.bool)
    seen[:, :num_sinks] = True
    for start, end in spans(cu_seqlens, num_tokens):
        for t in range(start, end):
            left = start if window is None else max(start, t - window + 1)
            seen[t, num_sinks + left : num_sinks + t + 1] = True
    k, v = (x[0] if sink is None else torch.cat([sink, x[0]]) for x, sink in ((k, sink_k), (v, sink_v)))
    k, v = per_query_head(q[0], k, v)
    scores = torch.einsum("thd,shd->hts", q[0], k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v)[None], scores.logsumexp(-1).T[None]


def moba(q, k, v, *, chunk_tokens, num_chunks, cu_seqlens=None):
    """o [1, T, Hq, V], query by query."""
    k, v = per_query_head(q[0], k[0], v[0])
    outputs = []
    for start, end in spans(cu_seqlens, q.shape[1]):
        for t in range(end - start):
            own = t // chunk_tokens
            for h in range(q.shape[2]):
                query, keys, values = q[0, start + t, h], k[start:end, h], v[start:end, h]
                means = [keys[c * chunk_tokens : (c + 1) * chunk_tokens].mean(0) for c in range(own)]
                ranked = sorted(range(own), key=lambda c: -float((query @ means[c]).detach()))[: num_chunks - 1]
                rows = [r for c in ranked for r in range(c * chunk_tokens, (c + 1) * chunk_tokens)]
                rows += range(own * chunk_tokens, t + 1)
                weights = (keys[rows] @ query * q.shape[-1] ** -0.5).softmax(-1)
                outputs.append(weights @ values[rows])
    return torch.stack(outputs).view(1, q.shape[1], q.shape[2], -1)


def assert_same(actual, expected, tolerance, what=""):
    """Relative norm of the difference of each pair; zero must be near zero."""
    for i, (a, b) in enumerate(zip(actual, expected)):
        assert a.shape == b.shape, f"{what}[{i}]: shape {list(a.shape)} instead of {list(b.shape)}"
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)
        assert error <= tolerance, f"{what}[{i}]: relative error {error:.2e} > {tolerance:.0e}"


def gradients(outputs, inputs):
    """Gradients of a fixed random weighting of the outputs; zeros for unused inputs."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights))
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]
