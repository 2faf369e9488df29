"""INT8 weights: scales, fixed points, and what is refused."""

from __future__ import annotations

import pytest
import torch

from sbtrain.spiking.quantize import dequantize, group_scales, output_error, quantize


def test_scales_are_the_largest_weight_of_a_group_over_127():
    weight = torch.tensor([[0.5, -2.54, 1.27, 0.0], [0.0, 0.0, -127.0, 3.0]])
    scales = group_scales(weight, 2)
    assert scales.shape == (2, 2, 1)
    assert torch.allclose(scales[..., 0], torch.tensor([[0.02, 0.01], [1.0, 1.0]]))
    assert quantize(weight, scales).tolist() == [[25, -127, 127, 0], [0, 0, -127, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("group", [1, 5, 40])
def test_dequantized_weights_are_fixed_points(dtype, group):
    weight = (torch.randn(30, 40) * torch.logspace(-30, 6, 30)[:, None]).to(dtype)
    scales = group_scales(weight, group)
    integers = quantize(weight, scales)
    value = dequantize(integers, scales, dtype)
    assert integers.dtype == torch.int8 and integers.abs().max() == 127 and value.dtype == dtype
    assert torch.equal(quantize(value, scales), integers)
    error = (dequantize(integers, scales) - weight).unflatten(1, (-1, group)).abs()
    assert (error <= scales * (0.5 + 1e-5)).all()


def test_zeros_and_the_smallest_numbers():
    weight = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [1e-38, -1e-38]])
    scales = group_scales(weight, 2)
    integers = quantize(weight, scales)
    assert scales[0].item() == 1.0 and not integers[:2].any() and scales.isfinite().all()
    assert dequantize(integers, scales).isfinite().all()
    assert group_scales(torch.empty(0, 4), 2).shape == (0, 2, 1)


@pytest.mark.parametrize("group", [0, 3, 128])
def test_groups_that_do_not_divide(group):
    with pytest.raises(ValueError, match=f"groups of {group} input channels do not divide 4; choose a divisor"):
        group_scales(torch.ones(2, 4), group)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="not finite"):
        group_scales(torch.tensor([[1.0, bad]]), 2)


def test_the_output_error_is_that_of_the_outputs():
    x, weight, other = torch.randn(50, 8).double(), torch.randn(6, 8).double(), torch.randn(6, 8).double()
    expected = (x @ (weight - other).T).norm() / (x @ weight.T).norm()
    assert output_error(weight, other, 3 * x.T @ x) == pytest.approx(expected.item(), rel=1e-9)
    assert output_error(torch.zeros_like(weight), other, x.T @ x) == 0.0
