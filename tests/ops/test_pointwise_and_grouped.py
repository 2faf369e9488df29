"""ops.rms_norm, ops.swiglu, ops.rope and ops.grouped_mm against formulas written out in float64."""

import pytest
import torch

import ops
from op_oracles import assert_same, cu, gradients


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
    with pytest.raises(ValueError, match="offsets must be"):
        ops.grouped_mm(x, x.new_zeros(2, 3, 4), offsets=cu(0, 9))
