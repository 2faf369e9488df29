"""Kernels of the spike ops in Triton's interpreter with both files' tiles."""

from __future__ import annotations

import pytest

from interpreted_spike_case import coded, counted, in_bf16, odd_inputs, refused
from test_interpreted_kernels import pytestmark as needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.parametrize("backend", ["cuda", "maca"])]

SHAPES = [(3, 65, 96), (257, 64), (2, 3584), (2, 18944), (1, 40000), (1, 1), (300, 1)]


@pytest.fixture(scope="module")
def interpreter(run_ranks):
    """One process for all cases."""
    return run_ranks(1, timeout_s=300.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, k", [("float32", 3.0), ("float16", 2.7)])
def test_counts_are_exact_given_the_threshold(interpreter, shape, dtype, k, backend):
    (found,) = interpreter(counted, backend, shape, dtype, k, None)
    ulp = {"float32": 2e-6, "float16": 2e-3}[dtype]  # the order of summation may move the mean by one rounding
    assert found.pop("threshold") <= ulp
    assert found == {"counts": 0, "values": 0, "gradients": 0}


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]], ids=str)
@pytest.mark.parametrize("dtype, given", [("float32", "float32"), ("float16", "float16"), ("float16", "float32")])
def test_a_mean_that_is_given_makes_the_references_threshold(interpreter, shape, dtype, given, backend):
    (found,) = interpreter(counted, backend, shape, dtype, 3.0, given)
    assert found == {"counts": 0, "values": 0, "gradients": 0, "threshold": 0.0}


def test_bf16(interpreter, backend):
    (found,) = interpreter(in_bf16, backend)
    assert found["counts"] == 0 and found["values"] <= 2**-7


def test_odd_inputs(interpreter, backend):
    assert interpreter(odd_inputs, backend) == [[]]


def test_codings(interpreter, backend):
    assert interpreter(coded, backend) == [[]]


def test_decoding_says_what_is_wrong(interpreter, backend):
    (said,) = interpreter(refused, backend)
    known = [
        ("binary", "0 and 1"),
        ("ternary", "-1, 0 and 1"),
        ("twos_complement", "0 and 1"),
        ("bidirectional", "-1, 0 and 1"),
        ("ternary", "-1, 0 and 1"),
        ("bidirectional", "-1, 0 and 1"),
    ]
    assert said[:6] == [f"spikes of encoding={name} must be {which}; there are others" for name, which in known]
    assert "int32 does not hold" in said[6] and "at most 63 steps" in said[7]
