"""ops.rms_norm, ops.swiglu, ops.rope and ops.grouped_mm against formulas written out in float64."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

import ops
from op_oracles import assert_same, cu, gradients

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def leaves(*shapes):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_rms_norm():
    x, weight = leaves((2, 5, 16), (16,))
    expected = [weight * x / (x.pow(2).sum(-1, keepdim=True) / 16 + 1e-3).sqrt()]
    actual = [ops.rms_norm(x, weight, eps=1e-3)]
    assert_same(actual, expected, 1e-12)
    assert_same(gradients(actual, [x, weight]), gradients(expected, [x, weight]), 1e-12)
    half = ops.rms_norm(x.detach().bfloat16(), weight.detach().bfloat16(), eps=1e-3)
    assert half.dtype == torch.bfloat16
    assert_same([half], expected, 1e-2)


def test_rms_norm_adds_the_residual_first():
    x, residual, weight = leaves((2, 5, 16), (2, 5, 16), (16,))
    total = x + residual
    expected = [weight * total / (total.pow(2).sum(-1, keepdim=True) / 16 + 1e-3).sqrt(), total]
    actual = ops.rms_norm(x, weight, eps=1e-3, residual=residual)
    assert_same(actual, expected, 1e-12)
    inputs = [x, residual, weight]
    assert_same(gradients(actual, inputs), gradients(expected, inputs), 1e-12)


def test_rms_norm_with_residual_is_bitwise_the_two_steps():
    x, residual, weight = (y.detach().bfloat16() for y in leaves((5, 16), (5, 16), (16,)))
    y, total = ops.rms_norm(x, weight, eps=1e-3, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(total, weight, eps=1e-3))


def test_swiglu_takes_the_gate_from_the_first_half():
    (x,) = leaves((3, 4, 10))
    gate, up = x[..., :5], x[..., 5:]
    expected, actual = [gate / (1 + (-gate).exp()) * up], [ops.swiglu(x)]
    assert_same(actual, expected, 1e-12)
    assert_same(gradients(actual, [x]), gradients(expected, [x]), 1e-12)


def test_rope_turns_pairs_of_channels():
    (x,) = leaves((2, 7, 3, 8))
    positions = torch.randint(0, 500, (2, 7))
    inv_freq = 100.0 ** (-torch.arange(4) / 4)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    turned = pairs * torch.exp(1j * positions[..., None, None] * inv_freq.double())
    expected, actual = [torch.cat([turned.real, turned.imag], -1)], [ops.rope(x, positions, inv_freq)]
    assert_same(actual, expected, 1e-12)
    assert_same(gradients(actual, [x]), gradients(expected, [x]), 1e-12)
    assert_same([ops.rope(x.detach().float(), positions, inv_freq)], expected, 1e-5)


def test_rope_of_queries_and_keys_is_that_of_each():
    q, k = leaves((2, 7, 6, 8), (2, 7, 2, 8))
    positions, inv_freq = torch.randint(0, 500, (2, 7)), 100.0 ** (-torch.arange(4) / 4)
    expected, actual = [ops.rope(x, positions, inv_freq) for x in (q, k)], ops.rope_qk(q, k, positions, inv_freq)
    assert all(torch.equal(*pair) for pair in zip(actual, expected))
    assert_same(gradients(actual, [q, k]), gradients(expected, [q, k]), 1e-12)


def test_grouped_mm():
    x, weight = leaves((9, 4), (4, 6, 4))
    offsets = cu(0, 3, 3, 8, 9)
    expert = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3])
    expected = [torch.einsum("td,tfd->tf", x, weight[expert])]
    actual = [ops.grouped_mm(x, weight, offsets=offsets)]
    assert_same(actual, expected, 1e-12)
    assert_same(gradients(actual, [x, weight]), gradients(expected, [x, weight]), 1e-12)


def test_wrong_shapes_are_refused_in_one_line():
    x, weight = (y.detach() for y in leaves((9, 4), (5,)))
    with pytest.raises(ValueError, match="weight must be"):
        ops.rms_norm(x, weight, eps=1e-6)
    with pytest.raises(ValueError, match=r"residual must be torch.float64 \[9, 4\]"):
        ops.rms_norm(x, x[0], eps=1e-6, residual=x[1:])
    with pytest.raises(ValueError, match="two halves"):
        ops.swiglu(x[:, :3])
    with pytest.raises(ValueError, match="D even"):
        ops.rope(x[None, :, None], torch.zeros(1, 8, dtype=torch.int64), x[0, :2])
    heads, positions = x[None, :, None], torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"k, positions, inv_freq must be .* got \[1, 8, 1, 4\]"):
        ops.rope_qk(heads, heads[:, 1:], positions, x[0, :2])
    with pytest.raises(ValueError, match="one dtype, got torch.float64 and torch.float32; convert one"):
        ops.rope_qk(heads, heads.float(), positions, x[0, :2])
    with pytest.raises(ValueError, match="offsets must be"):
        ops.grouped_mm(x, x.new_zeros(2, 3, 4), offsets=cu(0, 9))


def kernel_file(op, backend):
    return import_module(f"ops.{op}.{backend}")


@needs_triton
@pytest.mark.parametrize("backend", ["cuda", "maca"])
def test_kernels_say_what_they_do_not_take(backend):
    float64, bf16 = (torch.empty(1, 6, 2, 4, dtype=dtype, device="meta") for dtype in (torch.float64, torch.bfloat16))
    labels = torch.empty(6, dtype=torch.int64, device="meta")

    def answers(x):
        rows, weight = x[0, :, 0], x[0, 0, 0]
        yield kernel_file("rms_norm", backend).accepts("rms_norm", rows, weight, eps=1e-6, residual=rows)
        yield kernel_file("swiglu", backend).accepts("swiglu", x)
        yield kernel_file("rope", backend).accepts("rope", x, labels[None], weight[:2])
        yield kernel_file("rope", backend).accepts("rope_qk", x, x, labels[None], weight[:2])
        yield kernel_file("linear_cross_entropy", backend).accepts("linear_cross_entropy", rows, rows, labels)
        yield kernel_file("grouped_mm", backend).accepts("grouped_mm", rows, x[0], offsets=labels)

    assert set(answers(float64)) == {"takes bf16, fp16 and fp32"}
    assert set(answers(bf16)) == {None}
    products = kernel_file("grouped_mm", backend).accepts
    assert products("grouped_mm", bf16[0, :, 0], float64[0], offsets=labels) == "takes x and weight of one dtype"


@needs_triton
def test_rms_norm_has_a_longest_row():
    for backend, most in (("cuda", 16384), ("maca", 8192)):
        accepts, rows = kernel_file("rms_norm", backend).accepts, torch.empty(2, most + 1, device="meta")
        assert accepts("rms_norm", rows, rows[0], eps=1e-6) == f"takes rows of up to {most} numbers"
        assert accepts("rms_norm", rows[:, 1:], rows[0, 1:], eps=1e-6) is None


@needs_triton
@pytest.mark.parametrize("backend", ["cuda", "maca"])
def test_empty_tensors_start_no_kernel(backend):
    x, weight, labels = torch.empty(1, 0, 2, 4), torch.ones(3, 4), torch.empty(0, dtype=torch.int64)
    normed, total = kernel_file("rms_norm", backend).rms_norm(x, weight[0], eps=1e-6, residual=x)
    assert normed.shape == total.shape == x.shape
    assert kernel_file("swiglu", backend).swiglu(x).shape == (1, 0, 2, 2)
    assert kernel_file("rope", backend).rope(x, labels[None], weight[0, :2]).shape == x.shape
    assert kernel_file("rope", backend).rope_qk(x, x, labels[None], weight[0, :2])[1].shape == x.shape
    assert kernel_file("linear_cross_entropy", backend).linear_cross_entropy(x[0, :, 0], weight, labels).shape == (0,)
    assert kernel_file("grouped_mm", backend).grouped_mm(x[0, :, 0], weight[None], offsets=cu(0, 0)).shape == (0, 3)
