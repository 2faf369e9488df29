"""Spiking linear layers with INT8 weights in Triton's interpreter, with both files' tiles; and what the op refuses."""

from __future__ import annotations

import pytest
import torch

import ops
from interpreted_spike_linear import empty, gradients, sums
from test_interpreted_kernels import pytestmark as needs_interpreter

BACKENDS = pytest.mark.parametrize("backend", ["cuda", "maca"])
MANY = dict(tokens=130, size=192, outputs=70, group=96, values={(1, 7): 900.0, (129, 191): -5e4})
CASES = [
    dict(tokens=1, size=32, outputs=5, group=32, values={}),
    dict(tokens=17, size=128, outputs=65, group=128, values={(3, 5): -400.0}),
    dict(tokens=5, size=192, outputs=33, group=96, values={(0, 100): 1e6, (0, 101): -3e5, (4, 0): 77.0}),
    dict(tokens=20, size=160, outputs=9, group=160, values={(19, 159): 2000.0}),
    MANY,
]


@pytest.fixture(scope="module")
def interpreter(run_ranks):
    """One process for all cases."""
    return run_ranks(1, timeout_s=300.0)


@needs_interpreter
@BACKENDS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_those_of_the_integers(interpreter, case, backend):
    ((error, largest, broken),) = interpreter(sums, backend, **case)
    assert error <= 1e-6 and broken == []
    assert largest > 127, "no count leaves int8"


@needs_interpreter
@BACKENDS
@pytest.mark.parametrize("dtype, tolerance", [("float16", 1e-3), ("bfloat16", 5e-3)])
def test_sums_in_low_precision(interpreter, dtype, tolerance, backend):
    ((error, largest, _),) = interpreter(sums, backend, **{**CASES[2], "values": {}}, dtype=dtype)
    assert error <= tolerance and largest > 300


@needs_interpreter
@BACKENDS
def test_tokens_without_numbers_stay_alone(interpreter, backend):
    zeros = {(4, channel): 0.0 for channel in range(128)}
    values = {**zeros, (1, 3): float("nan"), (6, 0): float("inf"), (7, 9): float("-inf"), (8, 1): 300.0}
    case = dict(tokens=18, size=128, outputs=40, group=64, values=values)
    ((error, _, broken),) = interpreter(sums, backend, **case)
    assert error <= 1e-6 and broken == [1, 6, 7]


@needs_interpreter
@BACKENDS
def test_gradients(interpreter, backend):
    ((of_x, of_bias, weight_has_none),) = interpreter(gradients, backend)
    assert of_x < 1e-5 and of_bias < 1e-5 and weight_has_none


@needs_interpreter
@BACKENDS
def test_empty(interpreter, backend):
    assert interpreter(empty, backend) == [[[2, 0, 5], [2, 3, 0]]]


def test_int8_weights_in_plain_torch():
    """The reference with int8 weights: what it computes, and its gradient."""
    x = torch.randn(4, 64, dtype=torch.float64).requires_grad_()
    weight, scale = torch.randint(-128, 128, (6, 64), dtype=torch.int8), torch.rand(6, 2, 1)
    y = ops.spike_linear(x, weight, weight_scale=scale)
    count, threshold = ops.spike_count(x.detach())
    plain = (weight.view(6, 2, 32) * scale).view(6, 64).double()
    torch.testing.assert_close(y.detach(), count.double() @ plain.T * threshold)
    y.sum().backward()
    torch.testing.assert_close(x.grad, plain.sum(0).expand(4, 64))


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_a_token_without_numbers_in_plain_torch(broken):
    """Also where the mean that is handed over does not tell; the others are left alone."""
    x, weight, scale = torch.randn(3, 64), torch.randint(-128, 128, (6, 64), dtype=torch.int8), torch.rand(6, 2, 1)
    mean = x.abs().mean(-1, keepdim=True)
    good = ops.spike_linear(x, weight, weight_scale=scale, mean_abs=mean)
    x[1, 7] = broken
    y = ops.spike_linear(x, weight, weight_scale=scale, mean_abs=mean)
    assert y[1].isnan().all() and torch.equal(y[::2], good[::2])


@pytest.mark.parametrize(
    "weight, options, problem",
    [
        (torch.ones(6, 64, dtype=torch.int8), {}, "weight_scale: missing"),
        (torch.ones(6, 64, dtype=torch.int32), {}, "torch.int8, got torch.int32"),
        (torch.ones(6, 32), {}, r"like x's last dimension, got \[6, 32\]"),
        (torch.ones(6, 64, dtype=torch.int8), dict(weight_scale=torch.ones(6, 4, 1)), "multiple of 32 dividing 64"),
        (torch.ones(6, 64, dtype=torch.int8), dict(weight_scale=torch.ones(6, 2)), r"must be \[6, 64 / g, 1\]"),
        (torch.ones(6, 64), dict(weight_scale=torch.ones(6, 3, 1)), "with g dividing 64"),
        (torch.ones(6, 64), dict(k=0.0), "k must be positive"),
        (torch.ones(6, 64), dict(bias=torch.ones(5)), r"bias must be \[6\]"),
        (torch.ones(6, 64), dict(mean_abs=torch.ones(4)), r"mean_abs must be \[4, 1\]"),
        (torch.ones(6, 64), dict(mean_abs=torch.ones(4, 1).half()), "in torch.float32 or torch.float32"),
    ],
)
def test_says_what_does_not_fit(weight, options, problem):
    with pytest.raises(ValueError, match=problem):
        ops.spike_linear(torch.ones(4, 64), weight, **options)
