"""Kernels of the pointwise ops, cross-entropy and grouped products in Triton's interpreter with both files' tiles."""

from __future__ import annotations

import pytest

from interpreted_pointwise_case import accumulated, buffered, differences
from test_interpreted_kernels import pytestmark as needs_interpreter
from test_interpreted_kernels import within

pytestmark = [needs_interpreter, pytest.mark.parametrize("backend", ["cuda", "maca"])]

CASES = [
    ("rms_norm", dict(shape=(3, 65, 96))),
    ("rms_norm", dict(shape=(257, 32), residual=True)),
    ("rms_norm", dict(shape=(2, 3584), residual=True)),
    ("rms_norm", dict(shape=(2, 5000))),
    ("rms_norm", dict(shape=(1, 1))),
    ("swiglu", dict(shape=(3, 5, 2 * 33))),
    ("swiglu", dict(shape=(2, 2 * 2100))),
    ("rope", dict(shape=(2, 33, 3, 64))),
    ("rope", dict(shape=(1, 257, 5, 128), part=slice(1, 4))),
    ("rope", dict(shape=(1, 1, 1, 6))),
    ("rope", dict(shape=(2, 33, 12, 64), part=slice(None, None, 2), keys=slice(1, None, 4))),
    ("rope", dict(shape=(1, 257, 8, 128), part=slice(5), keys=slice(5, 7))),
    ("rope", dict(shape=(2, 9, 48, 10), part=slice(41), keys=slice(41, 46))),
    ("rope", dict(shape=(1, 1, 3, 6), part=slice(1), keys=slice(1, 2))),
    ("grouped_mm", dict(edges=(0, 3, 3, 130, 131, 200, 200), sizes=(40, 72))),
    ("grouped_mm", dict(edges=(0, 0, 1), sizes=(7, 129))),
    ("linear_cross_entropy", dict(num_tokens=33, vocab=600, chunk_tokens=16)),
    ("linear_cross_entropy", dict(num_tokens=6, vocab=5000, valid_vocab=4999, per_token=False)),
    ("linear_cross_entropy", dict(num_tokens=1, vocab=7)),
]
LOW_PRECISION = [CASES[i] for i in (1, 5, 8, 10, 16)]


@pytest.fixture(scope="module")
def interpreter(run_ranks):
    """One process for all cases."""
    return run_ranks(1, timeout_s=300.0)


@pytest.mark.parametrize("op, case", CASES, ids=str)
def test_kernels(interpreter, op, case, backend):
    (values,) = interpreter(differences, op, backend, case)
    assert within(values, 1e-5), values


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("op, case", LOW_PRECISION, ids=str)
def test_kernels_in_low_precision(interpreter, op, case, dtype, tolerance, backend):
    (values,) = interpreter(differences, op, backend, case, dtype)
    assert within(values, tolerance), values


def test_grouped_mm_in_fp16(interpreter, backend):
    op, case = next(pair for pair in CASES if pair[0] == "grouped_mm")
    (values,) = interpreter(differences, op, backend, case, "float16")
    assert within(values, 2e-3), values


def test_cross_entropy_into_a_buffer(interpreter, backend):
    (values,) = interpreter(buffered, backend)
    assert within(values, 1e-5), values


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [1, 2048, 5001])
def test_accumulation_is_exact(interpreter, size, dtype, backend):
    assert interpreter(accumulated, backend, size, dtype) == [True]
