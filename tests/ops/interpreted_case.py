"""ops.gla's Triton kernels in Triton's interpreter, on the CPU: numerics and masks, no compiler and no hardware.

Runs on ranks of run_ranks, which start with TRITON_INTERPRET=1: the interpreter is chosen before Triton is imported. It
cannot multiply bf16.
"""

from __future__ import annotations


def differences(
    rank: int,
    *,
    num_tokens: int,
    edges: tuple[int, ...] | None = None,
    strength: float = 0.05,
    heads: tuple[int, int] = (6, 2),
    sizes: tuple[int, int] = (32, 32),
    rows: int = 1,
    with_state: bool = False,
    dtype: str = "float32",
    backend: str = "maca",
) -> list[float]:
    """Relative distance to the float64 reference: outputs, then gradients of q, k, v, log_decay and the state."""
    from importlib import import_module

    import torch

    from ops.gla import reference

    kernels = import_module(f"ops.gla.{backend}")
    shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
    q, k, v = (torch.randn(rows, num_tokens, *shape, dtype=torch.float64) for shape in shapes)
    log_decay = -2 * strength * torch.rand(rows, num_tokens, heads[1], sizes[0], dtype=torch.float64)
    inputs = [q.relu(), k.relu(), v, log_decay]
    documents = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    if with_state:
        num_documents = rows if edges is None else len(edges) - 1
        inputs.append(torch.randn(num_documents, heads[1], *sizes, dtype=torch.float64))
    results = []
    for module, kind in ((kernels, getattr(torch, dtype)), (reference, torch.float64)):
        leaves = [x.to(kind) for x in inputs[:4]]
        leaves += [x.to(torch.promote_types(kind, torch.float32)) for x in inputs[4:]]
        leaves = [x.requires_grad_() for x in leaves]
        state = leaves[4] if with_state else None
        o, final = module.gla(*leaves[:4], initial_state=state, cu_seqlens=documents, output_final_state=with_state)
        outputs = [o, final] if with_state else [o]
        generator = torch.Generator().manual_seed(7)
        loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    return [_distance(*pair) for pair in zip(*results)]


def states(rank: int, *, num_tokens: int, edges: tuple[int, ...] | None) -> list[float]:
    """gla_state alone: the state, exp(total), and the gradients of both."""
    import torch

    from ops.gla import maca, reference

    k, v = torch.randn(1, num_tokens, 2, 24), torch.randn(1, num_tokens, 2, 40)
    log_decay = -2 * torch.rand(1, num_tokens, 2, 24)
    documents = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    weights = torch.randn(2, 24, 40), torch.randn(2, 24)
    results = []
    for module, kind in ((maca, torch.float32), (reference, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in (k, v, log_decay)]
        state, total = module.gla_state(*leaves, cu_seqlens=documents)
        outputs = [state, (total / num_tokens).exp()]
        loss = sum((o * w.to(kind)).sum() for o, w in zip(outputs, weights))
        results.append([*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    return [_distance(*pair) for pair in zip(*results)]


def decoding(rank: int, *, num_tokens: int, with_state: bool) -> list[float]:
    """A few tokens of two rows without gradients: outputs and final states."""
    import torch

    from ops.gla import maca, reference

    q, k, v, state = (torch.randn(2, num_tokens, *shape) for shape in ((6, 24), (2, 24), (2, 40), (1, 1)))
    log_decay, state = -torch.rand(2, num_tokens, 2, 24), torch.randn(2, 2, 24, 40) if with_state else None
    results = []
    for module, kind in ((maca, torch.float32), (reference, torch.float64)):
        inputs = [x.to(kind) for x in (q, k, v, log_decay)]
        results.append(module.gla(*inputs, initial_state=state, output_final_state=True))
    return [_distance(*pair) for pair in zip(*results)]


def halves(rank: int, *, num_tokens: int, edges: tuple[int, ...] | None) -> list[float]:
    """gla_output alone, with the state that enters the first document."""
    import torch

    from ops.gla import maca, reference

    q, k, v, state = (torch.randn(1, num_tokens, n, 32) for n in (6, 2, 2, 1))
    log_decay, state = -0.1 * torch.rand(1, num_tokens, 2, 32), torch.randn(2, 32, 32)
    documents = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    results = []
    for module, kind in ((maca, torch.float32), (reference, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v, log_decay, state)]
        o = module.gla_output(*leaves, cu_seqlens=documents)
        results.append([o, *torch.autograd.grad((o * torch.arange(32.0).to(kind)).sum(), leaves, allow_unused=True)])
    return [_distance(*pair) for pair in zip(*results)]


def _distance(actual, expected) -> float:
    """Relative norm; NaN, which is what unwritten memory holds here, comes out as NaN and passes no comparison."""
    if expected is None:  # the state of an empty document reaches no output
        return float(actual.norm())
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-3))
