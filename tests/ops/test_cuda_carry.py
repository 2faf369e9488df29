"""ops.gla_carry on a GPU: its CUDA file against the reference in float64, and with ops.gla against ops.gla_output."""

import pytest
import torch

import ops
from test_cuda_backends import LENGTHS, TOLERANCES, compare, cu, cuda_module, gla_inputs, poison, randn

pytestmark = pytest.mark.gpu


def inputs(num_tokens, *, strength=0.05, heads=(12, 4), size=128):
    """o, q, fp32 log decays and a state."""
    q, _, _, log_decay = gla_inputs(num_tokens, strength=strength, heads=heads, size=size)
    return [randn(1, num_tokens, heads[0], size), q, log_decay, randn(heads[1], size, size).float()]


def carry(tensors, dtype, **options):
    compare("gla_carry", lambda m, *x: [m.gla_carry(1 * x[0], *x[1:], **options)], tensors, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("strength", [0.0, 0.05, 5.0])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_by_length(num_tokens, strength, dtype):
    carry(inputs(num_tokens, strength=strength), dtype)


@pytest.mark.parametrize("edges", [(0, 300, 300, 1000), (0, 0, 300, 1000), (0, 1000, 1000), (0, 1, 1000)])
def test_only_document_0_is_entered(edges):
    carry(inputs(1000, strength=0.01), torch.bfloat16, cu_seqlens=cu(*edges))


@pytest.mark.parametrize("heads, size", [((28, 4), 128), ((9, 3), 64), ((4, 4), 24), ((2, 1), 256)])
@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float16])
def test_shapes(heads, size, dtype):
    tensors = inputs(333, heads=heads, size=size)
    call = [lambda m, *x: [m.gla_carry(1 * x[0], *x[1:], scale=0.2)], tensors, dtype]
    compare("gla_carry", *call, tolerance=TOLERANCES.get(dtype, 3e-3))


@pytest.mark.parametrize("documents", [None, (0, 3000, 3000, 5000), (0, 0, 5000)])
@pytest.mark.parametrize("strength", [0.002, 0.05])
def test_gla_then_gla_carry_is_gla_output(documents, strength):
    cuda_module("gla_carry")
    tensors = [x.cuda() for x in gla_inputs(5000, strength=strength, heads=(28, 4))]
    tensors = [*(x.bfloat16() for x in tensors[:3]), tensors[3], 10 * torch.randn(4, 128, 128, device="cuda")]
    options = {} if documents is None else {"cu_seqlens": cu(*documents)}
    weights, results = torch.randn(1, 5000, 28, 128, device="cuda").bfloat16(), []
    for steps in (1, 2):
        poison()
        q, k, v, log_decay, state = leaves = [x.clone().requires_grad_() for x in tensors]
        if steps == 1:
            o = ops.gla_output(*leaves, **options)
        else:
            o = ops.gla_carry(ops.gla(q, k, v, log_decay, **options)[0], q, log_decay, state, **options)
        results.append([o, *torch.autograd.grad((o * weights).sum(), leaves)])
    for one, other in zip(*results):
        assert (one.float() - other.float()).norm() <= 2e-2 * one.float().norm()  # two roundings


def test_the_same_bits_every_time_and_o_in_place():
    leaves = [x.cuda() for x in inputs(4096, heads=(28, 4), strength=0.01)]
    leaves = [x.bfloat16() if i < 2 else x.float() for i, x in enumerate(leaves)]
    leaves = [x.requires_grad_() for x in leaves]
    runs = []
    for _ in range(3):
        o = 1 * leaves[0]
        result = ops.gla_carry(o, *leaves[1:])
        assert result.data_ptr() == o.data_ptr()
        runs.append([result, *torch.autograd.grad(result.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
