"""ops.gla_carry's Triton kernels in Triton's interpreter, on the CPU: numerics and masks, no compiler and no hardware.

Runs on ranks of run_ranks, which start with TRITON_INTERPRET=1: the interpreter is chosen before Triton is imported. It
cannot multiply bf16. Memory holds NaN until something is written there.
"""

from __future__ import annotations


def differences(
    rank: int,
    *,
    num_tokens: int,
    backend: str = "cuda",
    edges: tuple[int, ...] | None = None,
    strength: float = 0.05,
    heads: tuple[int, int] = (6, 2),
    sizes: tuple[int, int] = (32, 32),
    dtype: str = "float32",
    scale: float | None = None,
) -> list[float]:
    """Relative distance to the float64 reference: outputs, then gradients of o, q, log_decay and the state."""
    from importlib import import_module

    import torch

    from interpreted_case import _distance

    kind = getattr(torch, dtype)
    rounded = _inputs(num_tokens, strength, heads, sizes)
    rounded[:2] = (x.to(kind) for x in rounded[:2])
    options = dict(scale=scale, cu_seqlens=None if edges is None else torch.tensor(edges, dtype=torch.int32))
    results = []
    torch.use_deterministic_algorithms(True)  # with which memory is filled
    for name in (backend, "reference"):
        leaves = [(x.double() if name == "reference" else x.clone()).requires_grad_() for x in rounded]
        module = import_module(f"ops.gla_carry.{name}")
        actual = module.gla_carry(1 * leaves[0], *leaves[1:], **options)
        weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(7)).to(actual.dtype)
        results.append([actual, *torch.autograd.grad((actual * weights).sum(), leaves)])
    torch.use_deterministic_algorithms(False)
    return [_distance(*(x.detach() for x in pair)) for pair in zip(*results)]


def few_programs(rank: int, **case) -> list[float]:
    """differences, where a share of the state's gradient is of several chunks and a scan takes several steps."""
    from ops import tuning

    entries = {"chunks": {"C": 64, "PROGRAMS": 6}, "scan_sums": {"ROWS": 4, "BLOCK": 16}}
    with tuning.trying("gla_carry", "cuda", entries):
        return differences(rank, **case)


def two_steps(rank: int, *, edges: tuple[int, ...] | None) -> list[float]:
    """gla and gla_carry, in place, against gla_output in float64: outputs, then every gradient."""
    import torch

    from interpreted_case import _distance
    from ops.gla import cuda as kernels
    from ops.gla import reference
    from ops.gla_carry import cuda

    shapes = [(6, 32), (2, 32), (2, 16), (2, 32)]
    inputs = [torch.randn(1, 100, *shape) for shape in shapes] + [torch.randn(2, 32, 16)]
    inputs[3] = -0.1 * torch.rand_like(inputs[3])
    options = {} if edges is None else {"cu_seqlens": torch.tensor(edges, dtype=torch.int32)}
    weights, results = torch.randn(1, 100, 6, 16), []
    for exact in (False, True):
        leaves = [x.to(torch.float64 if exact else torch.float32, copy=True).requires_grad_() for x in inputs]
        if exact:
            o = reference.gla_output(*leaves, **options)
        else:
            o = kernels.gla(*leaves[:4], **options)[0]
            o = cuda.gla_carry(o, leaves[0], *leaves[3:], **options)
        results.append([o, *torch.autograd.grad((o * weights).sum(), leaves, materialize_grads=True)])
    return [_distance(*(x.detach() for x in pair)) for pair in zip(*results)]


def memory(rank: int) -> dict[str, bool]:
    """Whether the result lies in o's memory, for an o of every kind; and whether a kept o still has its values."""
    import torch

    from ops.gla_carry import cuda

    o, q, log_decay, state = _inputs(40, 0.05, (2, 1), (16, 16))
    kept, found = o.clone(), {}
    leaf, view, strided = o.clone().requires_grad_(), torch.cat([o, o])[1:], o.mT.contiguous().mT
    for name, given in dict(own=o.clone(), leaf=leaf, result=1 * leaf, view=view, strided=strided).items():
        actual = cuda.gla_carry(given, q, log_decay, state)
        found[name] = actual.data_ptr() == given.data_ptr()
        found[f"{name} kept"] = torch.equal(given.detach(), kept)
    squared = 1 * leaf
    needs_o = squared.square()
    actual = cuda.gla_carry(squared, q, log_decay, state)
    try:
        (needs_o + actual).sum().backward()
    except RuntimeError as error:
        found["caught"] = "modified by an inplace operation" in str(error)
    return found


def same_bits(rank: int) -> bool:
    """Whether two backward passes agree in every bit."""
    import torch

    from ops.gla_carry import cuda

    leaves = [x.requires_grad_() for x in _inputs(200, 0.02, (3, 1), (32, 16))]
    runs = [torch.autograd.grad(cuda.gla_carry(*leaves).square().sum(), leaves) for _ in range(2)]
    return all(torch.equal(*pair) for pair in zip(*runs))


def _inputs(num_tokens, strength, heads, sizes):
    """o, q, log_decay and the state, fp32."""
    import torch

    o, q = (torch.randn(1, num_tokens, heads[0], size) for size in sizes[::-1])
    log_decay = -2 * strength * torch.rand(1, num_tokens, heads[1], sizes[0])
    return [o, q, log_decay, torch.randn(heads[1], *sizes)]
