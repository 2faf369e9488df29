"""GPTQ against the rule that it factorizes, worked out anew for every column, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch

from sbtrain.spiking import gptq as gptq_module
from sbtrain.spiking.gptq import Hessian, gptq
from sbtrain.spiking.quantize import dequantize, group_scales, output_error, quantize


def correlated(num_tokens, num_inputs, generator, *, rank=4):
    """Inputs most of which move together, as activations do."""
    common = torch.randn(num_tokens, rank, generator=generator, dtype=torch.float64)
    mixed = common @ torch.randn(rank, num_inputs, generator=generator, dtype=torch.float64)
    return mixed + 0.3 * torch.randn(num_tokens, num_inputs, generator=generator, dtype=torch.float64)


def column_by_column(weight, hessian, *, group, damping):
    """Optimal brain surgeon, one column at a time: what remains of the Hessian is inverted every time."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    left, integers, scales = weight.clone(), torch.zeros_like(weight), []
    for j in range(weight.shape[1]):
        if j % group == 0:
            scales.append(left[:, j : j + group].abs().amax(1) / 127)
        integers[:, j] = (left[:, j] / scales[-1]).round().clamp(-127, 127)
        inverse = torch.linalg.inv(damped[j:, j:])
        error = left[:, j] - integers[:, j] * scales[-1]
        left[:, j:] -= error[:, None] * inverse[0][None] / inverse[0, 0]
    return integers, torch.stack(scales, 1)[..., None]


@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("group", [4, 12, 24])
def test_equals_the_rule_column_by_column(monkeypatch, group, block):
    monkeypatch.setattr(gptq_module, "BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    x = correlated(100, 24, generator)
    weight = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    integers, scales = gptq(weight, x.T @ x, group=group, damping=0.02)
    expected, expected_scales = column_by_column(weight, x.T @ x, group=group, damping=0.02)
    assert torch.equal(integers.double(), expected)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-9, atol=0)


def test_beats_rounding_to_nearest_on_correlated_inputs():
    """In every one of 20 draws, by far: the output error, on tokens that calibrated and on others."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = correlated(600, 64, generator)
        weight = torch.randn(16, 64, generator=generator, dtype=torch.float64)
        seen, unseen = (part.T @ part for part in x.split(400))
        nearest = dequantize(quantize(weight, group_scales(weight, 16)), group_scales(weight, 16))
        ours = dequantize(*gptq(weight, seen, group=16))
        for hessian in (seen, unseen):
            assert output_error(weight, ours, hessian) < 0.8 * output_error(weight, nearest, hessian), seed


def test_is_rounding_to_nearest_where_inputs_are_not_correlated():
    weight = torch.randn(7, 16)
    integers, scales = gptq(weight, torch.diag(torch.rand(16) + 0.1), group=8)
    assert torch.equal(scales, group_scales(weight, 8)) and torch.equal(integers, quantize(weight, scales))


def test_dead_inputs_round_to_nearest_and_change_nothing():
    generator = torch.Generator().manual_seed(1)
    x = correlated(100, 16, generator)
    x[:, [0, 5, 15]] = 0
    weight = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    weight[:, [5, 15]] *= 0.1  # the scales are the others'
    weight[:, 0] *= 0.1
    integers, scales = gptq(weight, x.T @ x, group=16)
    alive = [j for j in range(16) if j not in (0, 5, 15)]
    nearest = (weight / scales[:, 0]).round()
    assert torch.equal(integers[:, [0, 5, 15]].double(), nearest[:, [0, 5, 15]])
    # the mean of the diagonal, hence the damping, is over all channels
    again, _ = gptq(weight[:, alive], (x.T @ x)[alive][:, alive], group=13, damping=0.01 * 13 / 16)
    assert torch.equal(integers[:, alive], again)
    integers, scales = gptq(weight, torch.zeros(16, 16, dtype=torch.float64), group=4)
    assert torch.equal(integers, quantize(weight, group_scales(weight, 4)))


def test_few_tokens_need_more_damping_and_get_it():
    x = torch.randn(2, 32)  # rank 2; without damping nothing can be inverted
    integers, scales = gptq(torch.randn(5, 32), x.T @ x, group=8, damping=1e-8)
    assert dequantize(integers, scales).isfinite().all()


def test_the_hessian_is_the_sum_over_tokens():
    x = torch.randn(3, 7, 1, 5).bfloat16()
    hessian = Hessian(5, device="cpu")
    for part in x:
        hessian.add(part)
    rows = x.flatten(0, -2).float()
    torch.testing.assert_close(hessian.matrix, rows.T @ rows)
    assert hessian.num_tokens == 21 and hessian.matrix.dtype == torch.float32


def test_refusals():
    with pytest.raises(ValueError, match="groups of 3 input channels do not divide 4"):
        gptq(torch.ones(2, 4), torch.eye(4), group=3)
    with pytest.raises(ValueError, match="inputs of a layer are not finite"):
        gptq(torch.ones(2, 4), torch.full((4, 4), float("nan")), group=2)
    with pytest.raises(ValueError, match="a weight is not finite"):
        gptq(torch.full((2, 4), float("inf")), torch.eye(4), group=2)
