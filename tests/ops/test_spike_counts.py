"""ops.spike_count and ops.spike_values on the CPU: worked example, means from elsewhere, odd inputs, gradients."""

import math

import numpy
import pytest
import torch

import ops

X = torch.tensor([0.9, -2.1, 0.1, 0.4, -0.05, 3.0, -0.6, 0.25])
X_HAT = torch.tensor([0.925, -2.158333, 0.0, 0.308333, 0.0, 3.083333, -0.616667, 0.308333])
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def activations(*shape, dtype=torch.float32):
    """Heavy tails, as activations have them."""
    x = torch.randn(*shape, dtype=torch.float64) * torch.randn(*shape, dtype=torch.float64).exp()
    return x.to(dtype)


def test_worked_example():
    count, threshold = ops.spike_count(X)
    torch.testing.assert_close(ops.spike_values(X), X_HAT, atol=1e-6, rtol=0)
    assert torch.equal(ops.spike_values(X), count * threshold)
    assert threshold.item() == pytest.approx(0.308333, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2.5, 3.0, 4.0])
def test_counts_are_float64_divisions_given_the_threshold(dtype, k):
    """Rounded to fp32 before they are rounded to counts: in bf16 and fp16 many quotients are halves only then."""
    x = activations(3, 50, 200, dtype=dtype)
    count, threshold = ops.spike_count(x, k=k)
    wide = torch.promote_types(dtype, torch.float32)
    assert threshold.dtype == wide and threshold.shape == (3, 50, 1)
    mean = x.abs().mean(-1, keepdim=True)
    assert mean.dtype == dtype
    assert torch.equal(threshold, mean.to(wide) / torch.tensor(k, dtype=wide))
    assert torch.equal(count.double(), (x.double() / threshold.double()).to(wide).double().round())
    x_hat = ops.spike_values(x, k=k)
    assert x_hat.dtype == dtype and torch.equal(x_hat, (count * threshold).to(dtype))


def test_counts_are_rounded_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1.25])
    count, _ = ops.spike_count(x, k=1.0, mean_abs=torch.ones(1))
    assert count.tolist() == [0, 2, 2, 0, -2, -2, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_with_the_mean_of_the_whole(dtype):
    x = activations(7, 96, dtype=dtype)
    whole, mean = ops.spike_count(x), x.abs().mean(-1, keepdim=True)
    for given in (mean, mean.float()) if dtype != torch.float64 else (mean,):
        parts = [ops.spike_count(part, mean_abs=given) for part in x.split(32, -1)]
        assert torch.equal(torch.cat([part[0] for part in parts], -1), whole[0])
        assert all(torch.equal(part[1], whole[1]) for part in parts)
        values = torch.cat([ops.spike_values(part, mean_abs=given) for part in x.split(32, -1)], -1)
        assert torch.equal(values, ops.spike_values(x))


def test_a_mean_in_fp32_is_rounded_like_the_tokens_own():
    x = activations(50, 64, dtype=torch.bfloat16)
    exact = x.float().abs().mean(-1, keepdim=True)
    assert not torch.equal(exact, exact.bfloat16().float())
    assert torch.equal(ops.spike_count(x, mean_abs=exact)[1], ops.spike_count(x)[1])


def test_zeros_and_one_sign():
    count, threshold = ops.spike_count(torch.zeros(2, 5))
    assert not count.any() and torch.equal(threshold, torch.full((2, 1), 1e-5))
    assert torch.equal(ops.spike_values(torch.zeros(2, 5)), torch.zeros(2, 5))
    for x in (X.abs(), -X.abs()):
        assert ops.spike_count(x)[0].tolist() == (x.sign() * torch.tensor([3, 7, 0, 1, 0, 10, 2, 1])).int().tolist()
    constant = torch.full((4,), -0.7)
    assert ops.spike_count(constant, k=4.0)[0].tolist() == [-4] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_seen_in_its_whole_token_only(bad, dtype):
    x = activations(3, 16, dtype=dtype)
    clean = ops.spike_count(x), ops.spike_values(x)
    x[1, 5] = bad
    count, threshold = ops.spike_count(x)
    x_hat = ops.spike_values(x)
    assert threshold[1].isnan() and not count[1].any() and x_hat[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(count[row], clean[0][0][row]) and torch.equal(x_hat[row], clean[1][row])
    count, threshold = ops.spike_count(x, mean_abs=torch.ones(3, 1))
    x_hat = ops.spike_values(x, mean_abs=torch.ones(3, 1))
    assert count[1, 5] == 0 and threshold.isfinite().all()
    assert x_hat.isnan().nonzero().tolist() == [[1, 5]]


def test_a_mean_that_x_cannot_hold_is_not_finite():
    x = torch.ones(2, 3, dtype=torch.float16)
    assert ops.spike_values(x, mean_abs=torch.tensor([[7e4], [6e4]])).isnan().all(-1).tolist() == [True, False]


def test_the_largest_of_fp16_may_become_inf():
    x = torch.tensor([[65504.0, 65504.0], [65504.0, 60000.0], [65504.0, 3.0]], dtype=torch.float16)
    assert ops.spike_values(x).isinf().tolist() == [[True, True], [True, False], [True, False]]
    count, threshold = ops.spike_count(x)
    assert count[0].tolist() == [7, 7] and threshold[0].item() == 1e4
    assert torch.equal(ops.spike_values(x[:1], k=16.0), x[:1])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (3, 0, 8), (0,)])
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    count, threshold = ops.spike_count(x)
    assert count.shape == x.shape and count.dtype == torch.int32
    assert threshold.shape == (*shape[:-1], 1) and (threshold == 1e-5).all()
    x_hat = ops.spike_values(x)
    x_hat.sum().backward()
    assert x_hat.shape == x.shape and x.grad.shape == x.shape


@pytest.mark.parametrize("x", [0.5, -0.5, 1e-7, -3e8])
def test_one_element(x):
    """One channel is its own mean: k spikes where the threshold is inside its ends."""
    count, threshold = ops.spike_count(torch.tensor([x]))
    assert threshold.item() == pytest.approx(min(max(abs(x) / 3, 1e-5), 1e4))
    assert count.item() == round(x / threshold.item())


def test_counts_stay_inside_int32():
    count, threshold = ops.spike_count(torch.tensor([1e38, -1e38, 1.0, 0.0]))
    assert threshold.item() == 1e4
    assert count.tolist() == [2**31 - 128, -(2**31) + 128, 0, 0]


def test_counts_stay_inside_int32_with_int8_weights_alone():
    x = torch.tensor([1e38, *[0.0] * 31])
    weight = torch.ones(1, 32, dtype=torch.int8)
    held = ops.spike_linear(x, weight, weight_scale=torch.ones(1, 1, 1))
    assert held.item() == pytest.approx((2**31 - 128) * 1e4)
    assert ops.spike_linear(x, weight.float()).item() == ops.spike_values(x)[0].item() == pytest.approx(1e38)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_pass_straight_through(dtype):
    x, mean = activations(4, 33, dtype=dtype).requires_grad_(), torch.ones(4, 1, dtype=dtype, requires_grad=True)
    for x_hat in (ops.spike_values(x), ops.spike_values(x, k=2.0, mean_abs=mean)):
        upstream = torch.randn_like(x_hat)
        to_x, to_mean = torch.autograd.grad(x_hat, (x, mean), upstream, allow_unused=True)
        assert torch.equal(to_x, upstream) and to_mean is None
    count, threshold = ops.spike_count(x)
    assert not threshold.requires_grad and not count.requires_grad


def linear(x, **options):
    """ops.spike_linear with some weight."""
    return ops.spike_linear(x, torch.ones(2, 8), **options)


@pytest.mark.parametrize("k", [0, 0.0, -3.0, math.nan, math.inf, 1e39, 1e-46, "3", None, [3]])
@pytest.mark.parametrize("function", [ops.spike_count, ops.spike_values, linear])
def test_impossible_k(function, k):
    with pytest.raises(ValueError, match="^k must be positive and finite in fp32 .*, got") as error:
        function(X, k=k)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("k", [torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max, numpy.float32(3), 3])
@pytest.mark.parametrize("function", [ops.spike_values, linear])
def test_possible_k(function, k):
    assert function(X, k=k).isfinite().all() and not function(torch.zeros(8), k=k).any()


@pytest.mark.parametrize("function", [ops.spike_count, ops.spike_values])
def test_impossible_tensors(function):
    with pytest.raises(ValueError, match="x must be floats .*int64"):
        function(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="x must be floats .*int64"):
        ops.spike_linear(torch.ones(3, dtype=torch.int64), torch.ones(2, 3))
    with pytest.raises(ValueError, match="x must be floats"):
        function(torch.tensor(1.0))
    for mean in (torch.ones(8), torch.ones(2, 1), torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"^mean_abs must be \[1\] in torch.float32 or .*, got"):
            function(X, mean_abs=mean)
