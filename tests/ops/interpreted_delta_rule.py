"""ops.gated_delta_rule's Triton kernels in Triton's interpreter, on the CPU: numerics and masks, no compiler.

Runs on ranks of run_ranks, which start with TRITON_INTERPRET=1: the interpreter is chosen before Triton is imported. It
cannot multiply bf16.
"""

from __future__ import annotations


def differences(
    rank: int,
    *,
    num_tokens: int,
    backend: str = "cuda",
    heads: tuple[int, int, int] = (2, 1, 2),
    sizes: tuple[int, int] = (32, 32),
    edges: tuple[int, ...] | None = None,
    rows: int = 1,
    strength: float = 0.05,
    with_state: bool = False,
    qk_l2norm: bool = False,
    dtype: str = "float32",
    with_gradients: bool = True,
    beta: float = 1.0,
    loss_of: tuple[int, ...] = (0, 1),
) -> list[float]:
    """Relative distance to the float64 reference: outputs, then gradients of q, k, v, log_decay, beta and the state."""
    from importlib import import_module

    import torch

    from interpreted_case import _distance

    heads_and_sizes = zip(heads, (sizes[0], sizes[0], sizes[1]))
    inputs = [torch.randn(rows, num_tokens, num, size, dtype=torch.float64) for num, size in heads_and_sizes]
    if not qk_l2norm:
        inputs[1] /= inputs[1].norm(dim=-1, keepdim=True)
    inputs.append(-2 * strength * torch.rand(rows, num_tokens, heads[2], dtype=torch.float64))
    inputs.append(beta * torch.rand(rows, num_tokens, heads[2], dtype=torch.float64))
    documents = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    if with_state:
        num_documents = rows if edges is None else len(edges) - 1
        inputs.append(torch.randn(num_documents, heads[2], *sizes, dtype=torch.float64))
    kind = getattr(torch, dtype)
    inputs = [x.to(kind if i < 3 else torch.float32) for i, x in enumerate(inputs)]
    results = []
    for name in (backend, "reference"):
        module = import_module(f"ops.gated_delta_rule.{name}")
        leaves = [x.double() if name == "reference" else x for x in inputs]
        leaves = [x.clone().requires_grad_(with_gradients) for x in leaves]
        state = leaves[5] if with_state else None
        o, final = module.gated_delta_rule(
            *leaves[:5],
            initial_state=state,
            cu_seqlens=documents,
            output_final_state=with_state,
            qk_l2norm=qk_l2norm,
        )
        outputs = [o, final] if with_state else [o]
        generator = torch.Generator().manual_seed(7)
        terms = [(x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in outputs]
        loss = sum(term for i, term in enumerate(terms) if i in loss_of)
        found = torch.autograd.grad(loss, leaves, materialize_grads=True) if with_gradients else ()
        results.append([*outputs, *found])
    return [_distance(*(x.detach() for x in pair)) for pair in zip(*results)]


def same_bits(rank: int, *, num_tokens: int) -> bool:
    """Whether two backward passes over heads that share keys and queries agree in every bit."""
    import torch

    from ops.gated_delta_rule import cuda

    shapes = [(2, 32), (2, 32), (4, 32), (4,), (4,)]
    q, k, v, log_decay, beta = leaves = [torch.rand(1, num_tokens, *shape).requires_grad_() for shape in shapes]
    found = []
    for _ in range(2):
        o, _ = cuda.gated_delta_rule(q, k, v, -log_decay, beta, qk_l2norm=True)
        found.append(torch.autograd.grad(o.square().sum(), leaves))
    return all(torch.equal(*pair) for pair in zip(*found))
