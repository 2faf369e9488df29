"""ops.attention's Triton kernels in Triton's interpreter; runs on ranks of run_ranks, like interpreted_case."""

from __future__ import annotations


def scaled(backend: str, most: int, num_programs: int | None = None) -> dict:
    """A backend's tiles with at most `most` queries and keys, so that short rows have several blocks."""
    from ops.tuning import tiles

    result = {
        name: {**tile, "M": min(tile["M"], most), "N": min(tile["N"], most)}
        for name, tile in tiles("attention", backend).items()
    }
    if num_programs is not None:
        for name in ("key_gradients", "key_gradients_fp32"):
            result[name]["PROGRAMS"] = num_programs
    return result


def attention_differences(
    rank: int,
    *,
    backend: str,
    num_tokens: int,
    num_queries: int | None = None,
    window: int | None = None,
    edges: tuple[int, ...] | None = None,
    num_sinks: int = 0,
    rows: int = 1,
    heads: tuple[int, int] = (6, 2),
    sizes: tuple[int, int] = (32, 32),
    scale: float | None = None,
    return_lse: bool = True,
    dtype: str = "float32",
    most: int = 64,
    num_programs: int | None = None,
    strided: bool = False,
) -> list[float]:
    """Relative distance to the float64 reference: outputs, then gradients of q, k, v and the sinks. The queries are
    num_queries of num_tokens; the reference always has them all, its outputs are cut."""
    import torch

    from ops.attention import reference, windowed

    tiles, num_queries = scaled(backend, most, num_programs), num_queries or num_tokens
    shapes = [(rows, num_tokens, heads[0], sizes[0])] + [(rows, num_tokens, heads[1], size) for size in sizes]
    shapes += [(num_sinks, heads[1], size) for size in sizes if num_sinks]
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    documents = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    results = []
    for run, kind in ((windowed.attention, getattr(torch, dtype)), (reference.attention, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        q, k, v = leaves[:3]
        if strided:  # as slices of one projection
            parts = torch.cat([x.flatten(2) for x in leaves[:3]], -1).split(
                [x.shape[2] * x.shape[3] for x in inputs], -1
            )
            q, k, v = (part.view(x.shape) for part, x in zip(parts, inputs))
        sinks = dict(zip(("sink_k", "sink_v"), leaves[3:] if num_sinks else (None, None)))
        how = dict(window=window, cu_seqlens=documents, scale=scale, return_lse=return_lse, **sinks)
        if run is windowed.attention:
            q, how = q[:, -num_queries:], {**how, "tiles": tiles, "tma": backend == "cuda"}
        outputs = run(q, k, v, **how)
        outputs = [x[:, -num_queries:] for x in (outputs if return_lse else [outputs])]
        generator = torch.Generator().manual_seed(7)
        loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    return [_distance(*pair) for pair in zip(*results)]


def equal_twice(rank: int, *, num_tokens: int, num_programs: int) -> list[bool]:
    """Whether two runs give the same bits, outputs and gradients; freshly allocated memory holds NaN here."""
    import torch

    from ops.attention import windowed

    tiles = scaled("maca", 32, num_programs)
    shapes = [(1, num_tokens, 6, 32), (1, num_tokens, 2, 32), (1, num_tokens, 2, 32), (3, 2, 32), (3, 2, 32)]
    leaves = [torch.randn(*shape).requires_grad_() for shape in shapes]
    how = dict(window=50, cu_seqlens=None, scale=None, return_lse=False, tiles=tiles)
    runs = []
    for _ in range(2):
        o = windowed.attention(*leaves[:3], sink_k=leaves[3], sink_v=leaves[4], **how)
        runs.append([o, *torch.autograd.grad(o.sin().sum(), leaves)])
    return [torch.equal(*pair) for pair in zip(*runs)]


def vendor_calls(rank: int, *, edges: tuple[int, ...] | None, num_queries: int = 8) -> list:
    """What ops/attention/maca.py asks of flash_attn: (positional sizes, options)."""
    import sys
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    import torch

    from ops.attention import maca

    calls, fake = [], ModuleType("flash_attn")
    fake.__spec__ = ModuleSpec("flash_attn", None)

    def record(q, *others, **options):
        calls.append([[list(x.shape) if torch.is_tensor(x) else x for x in (q, *others)], options])
        return q

    fake.flash_attn_func = fake.flash_attn_varlen_func = record
    q, k, v = (torch.randn(1, 8, heads, 16).half() for heads in (4, 2, 2))
    documents = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    sys.modules["flash_attn"] = fake
    try:
        o = maca.attention(q[:, -num_queries:], k, v, window=3, cu_seqlens=documents)
    finally:
        del sys.modules["flash_attn"]
    return [list(o.shape), *calls]


def _distance(actual, expected) -> float:
    """Relative norm; NaN passes no comparison."""
    return float(((actual.double() - expected).norm() / expected.norm().clamp(min=1e-3)).detach())


def trains_after_inference(rank: int) -> bool:
    """Whether gradients are found for a length that was first seen in inference mode."""
    import torch

    from ops.attention import windowed
    from ops.attention.visible import _row

    _row.cache_clear()
    leaves = [torch.randn(1, 23, 2, 16).requires_grad_() for _ in range(3)]
    how = dict(window=4, cu_seqlens=None, sink_k=None, sink_v=None, scale=None, return_lse=False)
    with torch.inference_mode():
        windowed.attention(*leaves, **how, tiles=scaled("maca", 32))
    windowed.attention(*leaves, **how, tiles=scaled("maca", 32)).sum().backward()
    return all(leaf.grad.isfinite().all() for leaf in leaves)
