"""Spiking linear layers with INT8 weights on a GPU against exact sums, whichever kernels take them."""

import pytest
import torch

import ops
from ops.spike_count.reference import spike_count
from test_cuda_backends import cuda_module, poison

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1e-6}


def layer(num_tokens, size, num_outputs, group, dtype=torch.bfloat16, outliers=True):
    """(x, weight, scale, bias, mean_abs); with counts far over int8, a token of zeros and small means."""
    x = torch.randn(num_tokens, size, device="cuda")
    if outliers:
        rows = torch.arange(1, num_tokens, 5, device="cuda")
        x[rows, rows * 37 % size] = 300.0
        x[0, 5] = -1000.0
        x[num_tokens // 2, size - 1] = 3e4
        if num_tokens > 3:
            x[3] = 0
    x = x.to(dtype)
    mean = x.float().abs().mean(-1, keepdim=True)
    mean[-1] /= 50
    weight = torch.randint(-128, 128, (num_outputs, size), device="cuda", dtype=torch.int8)
    scale = 1e-3 * (torch.rand(num_outputs, size // group, 1, device="cuda") + 0.5)
    return x, weight, scale, torch.randn(num_outputs, device="cuda").to(dtype), mean


def exact(x, weight, scale, bias, mean):
    """y in float64; counts times weights are exact there."""
    count, threshold = spike_count(x, mean_abs=mean)
    assert count.abs().max() > 127
    stored = (weight.double().unflatten(1, (scale.shape[1], -1)) * scale.double()).flatten(1)
    y = (count.double() @ stored.T) * threshold.double()
    return y if bias is None else y + bias.double()


def worst_error(num_tokens, size, num_outputs, group, dtype=torch.bfloat16, with_bias=True):
    """The largest relative error of a token."""
    module, _ = cuda_module("spike_linear")
    x, weight, scale, bias, mean = layer(num_tokens, size, num_outputs, group, dtype)
    bias = bias if with_bias else None
    poison()
    y = module.spike_linear(x, weight, bias, weight_scale=scale, mean_abs=mean)
    again = module.spike_linear(x, weight, bias, weight_scale=scale, mean_abs=mean)
    assert torch.equal(y, again), "differs between runs"
    expected = exact(x, weight, scale, bias, mean)
    return ((y.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-3)).max().item()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9, 16, 17, 33, 127, 128, 129, 777])
def test_numbers_of_tokens(num_tokens, per_row):
    assert worst_error(num_tokens, 1024, 520, 1024 if per_row else 128) <= TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    "size, num_outputs, num_tokens",
    [
        (3584, 4608, 4096),
        (3584, 3584, 1000),
        (3584, 37888, 513),
        (3584, 37888, 4096),
        (18944, 3584, 2049),
        (18944, 3584, 8192),
        (18944, 3584, 3),
        (18944, 3584, 16),
        (3584, 37888, 16),
    ],
)
def test_shapes_of_7b(size, num_outputs, num_tokens, per_row):
    group = size if per_row else 128
    assert worst_error(num_tokens, size, num_outputs, group, with_bias=False) <= TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("num_tokens", [3, 300])
@pytest.mark.parametrize("size, num_outputs, group", [(512, 264, 128), (512, 77, 128), (576, 130, 96), (96, 40, 32)])
def test_other_groups_and_dtypes(size, num_outputs, group, num_tokens, dtype):
    """Among them what Hopper's kernels leave to the others: 77 outputs, fp32, groups that are not 128."""
    assert worst_error(num_tokens, size, num_outputs, group, dtype) <= TOLERANCES[dtype]


@pytest.mark.parametrize("num_tokens", [9, 300])
def test_tokens_without_numbers_stay_alone(num_tokens):
    x, weight, scale, bias, mean = layer(num_tokens, 512, 264, 128)
    good = ops.spike_linear(x, weight, bias, weight_scale=scale, mean_abs=mean)
    x[2, 7], x[7, 500] = float("nan"), float("inf")
    mean[2], mean[7] = float("nan"), float("inf")
    y = ops.spike_linear(x, weight, bias, weight_scale=scale, mean_abs=mean)
    broken = y.isnan()
    assert broken.all(1).nonzero().flatten().tolist() == [2, 7] and broken.any(1).sum() == 2
    assert torch.equal(y[~broken.any(1)], good[~broken.any(1)])


@pytest.mark.parametrize("num_tokens", [7, 300])
def test_gradients(num_tokens):
    x, weight, scale, bias, _ = layer(num_tokens, 512, 264, 128, outliers=False)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    y = ops.spike_linear(x, weight, bias, weight_scale=scale)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    stored = (weight.double().unflatten(1, (4, 128)) * scale).flatten(1)
    for found, wanted in ((x.grad, upstream.double() @ stored), (bias.grad, upstream.double().sum(0))):
        assert (found - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("name", ["groups", "groups_wide", "rows", "rows_wide"])
@pytest.mark.parametrize("size", [1024, 9216])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tile_of_many_tokens(name, size, dtype):
    """Also where the rule by shape takes another; 9216 channels are deep. Every program has several tiles."""
    from ops import tuning
    from ops.spike_linear import hopper
    from ops.spike_linear.launch import Call

    cuda_module("spike_linear")
    if not hopper.is_hopper(torch.device("cuda")):
        pytest.skip(f"these tiles are for Hopper and Triton {hopper.TRITON}x")
    per_row = name.startswith("rows")
    x, weight, scale, bias, mean = layer(2051, size, 3592, size if per_row else 128, dtype)
    made = hopper.Many(size, scale.shape[1], tuning.tiles("spike_linear", "cuda"))
    made.tile = made.wide_tile = made.wide_tile if name.endswith("wide") else made.tile
    poison()
    call = Call(x, weight, bias, 3.0, scale, mean.flatten())
    y = made(call)
    assert torch.equal(y, made(call)), "differs between runs"
    expected = exact(x, weight, scale, bias, mean)
    error = (y.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-3)
    assert error.max() <= TOLERANCES[dtype]


@pytest.mark.parametrize("num_tokens", [1, 16, 300])
def test_captured_in_a_graph(num_tokens):
    """Twice in a row, on an x that is written just before: kernels start early and must wait."""
    x, weight, scale, bias, _ = layer(num_tokens, 512, 264, 128)
    y = ops.spike_linear(x, weight, bias, weight_scale=scale)
    graph, source = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        captured = []
        for _ in range(2):
            x.copy_(source)
            captured.append(ops.spike_linear(x, weight, bias, weight_scale=scale))
            x.zero_()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(found, y) for found in captured)
